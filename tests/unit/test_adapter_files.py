"""What may not reach an engine is refused by name; equal adapters have equal digests; names are never reused."""

from __future__ import annotations

import json
import os
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from loop.adapter_files import (
    AdapterFiles,
    AdapterNameTaken,
    adapter_digest,
    base_digest,
    check,
    install,
    read_base_config,
)
from loop.plain_lora import AdapterRejected, BaseMissing
from loop.settings import LINEAR_LAYERS
from tests.adapters import CONFIG, TINY, WEIGHTS, Weights, tensor_bytes, weights_for, write_adapter

FIRST_B = "base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight"


def checked(folder: Path, **options: Any) -> AdapterFiles:
    return check(folder, TINY, **{"max_rank": 8, "target_modules": LINEAR_LAYERS, **options})


def rejected(folder: Path, **options: Any) -> str:
    with pytest.raises(AdapterRejected) as error:
        checked(folder, **options)
    return str(error.value)


def only(value: float) -> Any:
    """A change of one single value of one tensor."""

    def change(weights: Weights) -> None:
        weights[FIRST_B][0, 0] = value

    return change


@pytest.mark.parametrize("dtype", ["BF16", "F16", "F32"])
def test_a_plain_lora_passes(tmp_path: Path, dtype: str) -> None:
    """In each dtype that trainers write; the facts are those of the files."""
    found = checked(write_adapter(tmp_path / "a", TINY, dtype=dtype), base_name="base")
    assert (found.rank, found.alpha, found.tensors) == (4, 8.0, 2 * 7 * 2)
    assert found.target_modules == tuple(sorted(LINEAR_LAYERS))
    assert found.effect_norm > 0
    assert found.digest == adapter_digest(tmp_path / "a")


def test_an_adapter_without_effect_is_told_not_refused(tmp_path: Path) -> None:
    """All-zero B: safe to load; the gate decides on it."""
    assert checked(write_adapter(tmp_path / "a", TINY, size=0)).effect_norm == 0


@pytest.mark.parametrize("dtype", ["BF16", "F16", "F32"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_one_value_that_is_not_finite_is_refused(tmp_path: Path, dtype: str, value: float) -> None:
    """One request to it would make vLLM answer nothing to anybody until it is restarted."""
    folder = write_adapter(tmp_path / "a", TINY, dtype=dtype, change=only(value))
    assert FIRST_B in rejected(folder)


def test_a_value_that_overflows_half_precision_is_refused(tmp_path: Path) -> None:
    """Finite in float32, infinite in an engine of float16."""
    assert "65504" in rejected(write_adapter(tmp_path / "a", TINY, dtype="F32", change=only(1e5)))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda w: {n: v for n, v in w.items() if ".layers.1." not in n}, "missing"),
        (lambda w: {n.replace("layers.1.", "layers.77."): v for n, v in w.items()}, "layer or module"),
        (lambda w: {n.replace("q_proj", "zz_proj"): v for n, v in w.items()}, "layer or module"),
        (lambda w: {n.replace("lora_A", "lora_embedding_A"): v for n, v in w.items()}, "no LoRA tensor"),
        (lambda w: {**w, "base_model.model.lm_head.weight": np.zeros((4, 4), np.float32)}, "no LoRA tensor"),
        (lambda w: {n: v.T.copy() for n, v in w.items()}, "shape"),
    ],
)
def test_tensors_that_do_not_fit_the_base_are_refused(tmp_path: Path, change: Any, said: str) -> None:
    """vLLM on CPU accepts each of these in silence."""
    assert said in rejected(write_adapter(tmp_path / "a", TINY, change=change))


def test_an_adapter_of_another_base_is_refused(tmp_path: Path) -> None:
    """By its shapes, and by the name that its configuration carries."""
    folder = write_adapter(tmp_path / "a", {**TINY, "hidden_size": 32})
    assert "another base" in rejected(folder)
    same_shapes = write_adapter(tmp_path / "b", TINY, base_name="other")
    assert "'other'" in rejected(same_shapes, base_name="base")


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"use_dora": True}, "use_dora"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"bias": "all"}, "bias"),
        ({"rank_pattern": {"q_proj": 8}}, "rank_pattern"),
        ({"layers_to_transform": [0]}, "layers_to_transform"),
        ({"peft_type": "IA3"}, "IA3"),
        ({"r": True}, "rank"),
        ({"r": "4"}, "rank"),
        ({"target_modules": "all-linear"}, "target_modules"),
        ({"target_modules": ["lm_head"]}, "lm_head"),
        ({"lora_alpha": float("nan")}, "lora_alpha"),
        ({"lora_alpha": -1}, "lora_alpha"),
    ],
)
def test_what_engines_do_not_serve_is_refused(tmp_path: Path, config: dict[str, Any], said: str) -> None:
    """Before the load, and with the field's name."""
    folder = write_adapter(tmp_path / "a", TINY)
    whole = json.loads((folder / CONFIG).read_text()) | config
    (folder / CONFIG).write_text(json.dumps(whole))
    assert said in rejected(folder)


def test_a_rank_above_the_engines_is_refused(tmp_path: Path) -> None:
    """vLLM would answer 500."""
    assert "rank 16" in rejected(write_adapter(tmp_path / "a", TINY, rank=16))


def test_modules_outside_the_project_are_refused(tmp_path: Path) -> None:
    """An engine started for fewer modules would leave the others without effect."""
    assert "'down_proj'" in rejected(write_adapter(tmp_path / "a", TINY), target_modules=("q_proj", "v_proj"))


@pytest.mark.parametrize("name", ["training_args.bin", "optimizer.pt", "README.md", "sub/adapter_model.safetensors"])
def test_other_files_are_refused(tmp_path: Path, name: str) -> None:
    """A pickle runs code where it is opened: only the two files may be there."""
    folder = write_adapter(tmp_path / "a", TINY)
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).write_bytes(b"x")
    assert name.split("/", maxsplit=1)[0] in rejected(folder)


def test_links_are_refused(tmp_path: Path) -> None:
    """A link would let an engine read a file of its own machine."""
    folder = write_adapter(tmp_path / "a", TINY)
    (folder / WEIGHTS).rename(tmp_path / "elsewhere")
    (folder / WEIGHTS).symlink_to(tmp_path / "elsewhere")
    assert WEIGHTS in rejected(folder)
    (tmp_path / "b").symlink_to(folder)
    assert "not a folder" in rejected(tmp_path / "b")


@pytest.mark.parametrize("name", [CONFIG, WEIGHTS])
def test_a_missing_file_is_named(tmp_path: Path, name: str) -> None:
    """The message says which."""
    folder = write_adapter(tmp_path / "a", TINY)
    (folder / name).unlink()
    assert name in rejected(folder)


@pytest.mark.parametrize("text", ["{", "[1]", "[" * 100_000, ""])
def test_a_broken_configuration_is_refused(tmp_path: Path, text: str) -> None:
    """Also one that is nested without end."""
    folder = write_adapter(tmp_path / "a", TINY)
    (folder / CONFIG).write_text(text)
    assert CONFIG in rejected(folder)


def broken_files() -> dict[str, bytes]:
    weights = weights_for(TINY)
    whole = tensor_bytes(weights)
    entry = {"dtype": "BF16", "shape": [64, 4], "data_offsets": [0, 512]}
    return {
        "empty": b"",
        "cut short": whole[: len(whole) // 2],
        "one byte too many": whole + b"\0",
        "zeros": b"\0" * 4096,
        "header bomb": struct.pack("<Q", 2**40) + b"{}",
        "header nested without end": struct.pack("<Q", 200_000) + b"[" * 200_000,
        "header no object": struct.pack("<Q", 2) + b"[]",
        "overlap": tensor_bytes(weights, "BF16", **{FIRST_B: entry}),
        "integers": tensor_bytes(weights, "BF16", **{FIRST_B: {**entry, "dtype": "I8"}}),
        "negative shape": tensor_bytes(weights, "BF16", **{FIRST_B: {**entry, "shape": [-64, -4]}}),
        "huge shape": tensor_bytes(weights, "BF16", **{FIRST_B: {**entry, "shape": [2**40, 2**40]}}),
        "offsets that are no numbers": tensor_bytes(
            weights, "BF16", **{FIRST_B: {**entry, "data_offsets": ["0", "512"]}}
        ),
        "entry that is no object": tensor_bytes(weights, "BF16", **{FIRST_B: 7}),
        "a name twice": struct.pack("<Q", 20) + b'{"a": 1, "a": 2}    ',
    }


@pytest.mark.parametrize("what", broken_files())
def test_a_broken_tensor_file_is_refused(tmp_path: Path, what: str) -> None:
    """As AdapterRejected, whatever is wrong with it: never another error, never memory for an announced giant."""
    folder = write_adapter(tmp_path / "a", TINY)
    (folder / WEIGHTS).write_bytes(broken_files()[what])
    assert rejected(folder)


def test_equal_adapters_have_equal_digests(tmp_path: Path) -> None:
    """PEFT writes target_modules in any order, and whatever path the base was loaded from."""
    one = write_adapter(tmp_path / "a", TINY, base_name="base")
    modules = list(reversed(LINEAR_LAYERS))
    two = write_adapter(tmp_path / "b", TINY, base_name="/some/path", target_modules=modules, peft_version="9")
    assert adapter_digest(one) == adapter_digest(two)


@pytest.mark.parametrize("different", [{"seed": 1}, {"lora_alpha": 9}, {"dtype": "F32"}, {"use_rslora": True}])
def test_other_adapters_have_other_digests(tmp_path: Path, different: dict[str, Any]) -> None:
    """Whatever changes an answer changes the digest."""
    one = write_adapter(tmp_path / "a", TINY)
    two = write_adapter(tmp_path / "b", TINY, **different)
    assert adapter_digest(one) != adapter_digest(two)


def test_installed_is_a_copy_under_its_name(tmp_path: Path) -> None:
    """Twice is once; nothing temporary is left."""
    folder = write_adapter(tmp_path / "a", TINY)
    digest = adapter_digest(folder)
    for _ in range(2):
        target = install(folder, tmp_path / "adapters", "bot@v2", digest=digest)
    assert target == tmp_path / "adapters" / "bot@v2"
    assert adapter_digest(target) == digest
    assert os.listdir(tmp_path / "adapters") == ["bot@v2"]


def test_a_name_is_never_given_to_other_bytes(tmp_path: Path) -> None:
    """Old KV-cache blocks would answer for them."""
    one, two = write_adapter(tmp_path / "a", TINY), write_adapter(tmp_path / "b", TINY, seed=1)
    install(one, tmp_path / "adapters", "bot@v2", digest=adapter_digest(one))
    with pytest.raises(AdapterNameTaken):
        install(two, tmp_path / "adapters", "bot@v2", digest=adapter_digest(two))
    assert adapter_digest(tmp_path / "adapters" / "bot@v2") == adapter_digest(one)


@pytest.mark.parametrize("name", ["../evil@v2", "bot", "bot@v0", "bot@v2/..", "Bot@v2", "/abs@v2", "bot@v2\n"])
def test_a_name_that_leaves_the_folder_is_refused(tmp_path: Path, name: str) -> None:
    """Names come from settings and MLflow's numbers, and are checked all the same."""
    folder = write_adapter(tmp_path / "a", TINY)
    with pytest.raises(AdapterRejected):
        install(folder, tmp_path / "adapters", name, digest=adapter_digest(folder))


def base_folder(folder: Path) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({**TINY, "model_type": "llama"}))
    (folder / "model.safetensors").write_bytes(b"weights")
    (folder / "tokenizer.json").write_text("{}")
    return folder


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.json", "chat_template.jinja"])
def test_a_changed_base_has_another_digest(tmp_path: Path, name: str) -> None:
    """Weights, configuration, tokenizer and template all decide an answer; the cache sees a change at once."""
    folder = base_folder(tmp_path / "base")
    before = base_digest(folder)
    assert base_digest(folder) == before
    (folder / name).write_text('{"changed": 1}')
    assert base_digest(folder) != before


def test_files_that_decide_nothing_do_not_count(tmp_path: Path) -> None:
    """A README beside the weights makes no other base."""
    folder = base_folder(tmp_path / "base")
    before = base_digest(folder)
    (folder / "README.md").write_text("hello")
    assert base_digest(folder) == before


def test_a_folder_that_is_no_base_is_named(tmp_path: Path) -> None:
    """With the cure, and not as a bare file error."""
    for call in (base_digest, read_base_config):
        with pytest.raises(BaseMissing, match="nowhere"):
            call(tmp_path / "nowhere")
    folder = base_folder(tmp_path / "base")
    (folder / "config.json").write_text("{")
    with pytest.raises(BaseMissing):
        read_base_config(folder)


def test_a_text_model_inside_a_multimodal_one_is_read(tmp_path: Path) -> None:
    """Its sizes stand one level deeper."""
    folder = base_folder(tmp_path / "base")
    (folder / "config.json").write_text(json.dumps({"vision": {}, "text_config": TINY}))
    assert read_base_config(folder) == TINY
