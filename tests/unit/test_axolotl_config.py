"""The typed recipe as axolotl's YAML, and what the preflight says where axolotl would do something else."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest

from loop.machine_memory import Machine
from loop.memory_estimate import GIB, Workload
from loop.outputs import Delta
from loop.preflight.finding import PreflightFailed
from loop.preflight.recipe import backend_can
from loop.run_plan import plans_of
from loop.settings import ProjectSettings, TrainerSettings
from loop.trainers.axolotl_config import render, rows_at_once
from loop.trainers.spec import TrainSpec
from loop.trainers.spec import render as render_spec
from tests.conftest import ROOT

PYTHON = ROOT / ".venv-axolotl" / "bin" / "python"
VALIDATE = """
import json, sys
from axolotl.utils.schemas.config import AxolotlInputConfig
for config in json.load(sys.stdin):
    known = set(AxolotlInputConfig.model_fields)
    AxolotlInputConfig.model_validate(config)
    print(json.dumps(sorted(set(config) - known)))
"""


def _spec(folder: Path, method: str = "sft", **recipe: Any) -> TrainSpec:
    settings = TrainerSettings(backend="axolotl", python="/p", replay_loss="ce", **recipe)
    places = {"base_dir": folder, "data_dir": folder, "out_dir": folder}
    return render_spec(settings, **places, base_name="b", base_digest="d", method=method)  # type: ignore[arg-type]  # a method


def _delta(method: str = "sft", base_rows: int = 9) -> Delta:
    return Delta.model_validate(
        {
            **{"data_dir": "/d", "digest": "x", "label_ids": (), "label_rows": 1, "replay_rows": 0},
            **{"base_rows": base_rows, "held_out_items": 0, "method": method},
        }
    )


def _project(**recipe: Any) -> ProjectSettings:
    return ProjectSettings(name="app", base_dir=Path("/b"), base_name="base", trainer=TrainerSettings(**recipe))


def test_nothing_of_the_recipe_is_lost_on_the_way(tmp_path: Path) -> None:
    """Names of axolotl's, values of ours; rows neither packed nor cut, in our order."""
    recipe: dict[str, Any] = {"rank": 3, "alpha": 5, "learning_rate": 0.5, "batch_size": 6, "seed": 7, "max_length": 99}
    config = render(_spec(tmp_path, scheduler="constant", **recipe), tmp_path, steps=11, on_gpu=False)
    assert (config["lora_r"], config["lora_alpha"], config["adapter"], config["load_in_4bit"]) == (3, 5, "qlora", True)
    assert (config["learning_rate"], config["micro_batch_size"], config["max_steps"]) == (0.5, 6, 11)
    assert (config["seed"], config["sequence_len"], config["lr_scheduler"]) == (7, 99, "constant_with_warmup")
    assert (config["sample_packing"], config["curriculum_sampling"]) == (False, True)
    assert config["excess_length_strategy"] == "raise"
    assert config["datasets"][0]["type"] is None
    assert config["bf16"] is False


def test_preferences_have_their_own_rate_and_half_the_batch(tmp_path: Path) -> None:
    """And beta, and the weights of thumbs."""
    recipe: dict[str, Any] = {"preference_beta": 0.3, "preference_learning_rate": 1e-5, "batch_size": 6}
    dpo = render(_spec(tmp_path, "dpo", **recipe), tmp_path, steps=2, on_gpu=True)
    assert (dpo["rl"], dpo["rl_beta"], dpo["learning_rate"], dpo["micro_batch_size"]) == ("dpo", 0.3, 1e-5, 3)
    assert dpo["bf16"] == "auto"
    kto = render(_spec(tmp_path, "kto"), tmp_path, steps=2, on_gpu=True, kto_weights=(1.0, 4.0))
    assert (kto["kto_desirable_weight"], kto["kto_undesirable_weight"]) == (1.0, 4.0)


def test_each_card_takes_its_share_of_the_rows(tmp_path: Path) -> None:
    """As many as on one card in all; FSDP by axolotl's own names, ZeRO-3 by DeepSpeed's file."""
    two = render(_spec(tmp_path, gpus=2), tmp_path, steps=1, on_gpu=True)
    assert two["micro_batch_size"] * 2 == render(_spec(tmp_path), tmp_path, steps=1, on_gpu=True)["micro_batch_size"]
    assert not {"fsdp_config", "deepspeed"} & two.keys()
    shared = render(_spec(tmp_path, gpus=4, sharding="fsdp"), tmp_path, steps=1, on_gpu=True)
    assert (shared["fsdp_version"], shared["fsdp_config"]["reshard_after_forward"]) == (2, True)
    assert shared["micro_batch_size"] == 2
    zero = render(_spec(tmp_path, gpus=2, sharding="zero3"), tmp_path, steps=1, on_gpu=True)
    assert zero["deepspeed"] == str(tmp_path / "zero3.json")
    assert "fsdp_config" not in zero


@pytest.mark.parametrize(
    ("method", "gpus", "wanted"),
    [("sft", 1, [12, 6, 4, 3, 2, 1]), ("sft", 3, [4, 2, 1]), ("dpo", 1, [6, 3, 2, 1]), ("kto", 2, [3])],
)
def test_a_step_goes_through_in_parts_that_are_alike(method: str, gpus: int, wanted: list[int], tmp_path: Path) -> None:
    """A thumb's loss needs the whole step; whatever the part, the step keeps its rows."""
    spec = _spec(tmp_path, method, batch_size=12, gpus=gpus)
    assert rows_at_once(spec) == wanted
    for rows in wanted:
        config = render(spec, tmp_path, steps=1, on_gpu=True, at_once=rows)
        assert config["micro_batch_size"] * config["gradient_accumulation_steps"] == wanted[0]


@pytest.mark.parametrize(
    ("mode", "wanted"), [("off", (False, None)), ("on", (True, None)), ("offload", (True, "hidden_states"))]
)
def test_what_is_kept_for_the_backward_pass_is_as_planned(
    mode: str, wanted: tuple[bool, str | None], tmp_path: Path
) -> None:
    config = render(_spec(tmp_path, checkpointing=mode), tmp_path, steps=1, on_gpu=True)
    assert (config["gradient_checkpointing"], config.get("activation_offloading")) == wanted


def test_memory_is_planned_for_whole_parts_and_all_logits(tmp_path: Path) -> None:
    """On 24 GiB, 16 rows of 2,048 do not go at once; and where our loss leaves room to recompute nothing, it must."""
    shape = {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "vocab_size": 128256}
    (tmp_path / "config.json").write_text(
        json.dumps({"model_type": "llama", **shape, "num_attention_heads": 32, "num_key_value_heads": 8})
    )
    spec = _spec(tmp_path, batch_size=16, max_length=2048, replay_share=0)
    card = Machine("cuda", "a card", 24 * GIB, 24 * GIB, 2)
    batch = Workload(16 * 2048, 2048, 16 * 512)
    plans = plans_of(spec, "axolotl", card, batch)
    assert plans[0].fits
    assert {plan.micro_tokens // 2048 for plan in plans} <= set(rows_at_once(spec))
    assert plans[0].micro_tokens < batch.tokens
    assert (plans[0].checkpointing, plans_of(spec, "peft", card, batch)[0].checkpointing) == ("on", "off")


@pytest.mark.slow
@pytest.mark.skipif(not PYTHON.exists(), reason="NOT TESTED WITH AXOLOTL: `make axolotl` has not been run")
def test_axolotls_own_schema_takes_every_configuration(tmp_path: Path) -> None:
    """And knows every key that we write: a mistyped one would be left unread."""
    specs = [_spec(tmp_path, method, scheduler=s) for method in ("sft", "dpo", "kto") for s in ("one_cycle", "cosine")]
    specs += [_spec(tmp_path, gpus=2, sharding=sharding) for sharding in ("replicate", "fsdp", "zero3")]
    specs += [_spec(tmp_path, checkpointing=mode) for mode in ("off", "on", "offload")]
    configs = [render(spec, tmp_path, steps=3, on_gpu=False) for spec in specs]
    asked = subprocess.run(
        [str(PYTHON), "-c", VALIDATE], input=json.dumps(configs), capture_output=True, text=True, check=False
    )
    assert asked.returncode == 0, asked.stderr[-2000:]
    assert [line for line in asked.stdout.splitlines() if line.startswith("[")] == ["[]"] * len(configs)


def test_the_preflight_refuses_what_would_be_another_training() -> None:
    """With each setting that would do; what is only unused is told, and the default backend does all."""
    with pytest.raises(PreflightFailed, match="no KL to the base") as refused:
        backend_can(_project(backend="axolotl", python="/p"), _delta())
    assert 'replay_loss = "ce"' in refused.value.hint
    with pytest.raises(PreflightFailed, match="starts from the base"):
        backend_can(_project(backend="axolotl", python="/p", replay_loss="ce", start="current"), _delta())
    with pytest.raises(PreflightFailed, match="takes no replay rows"):
        backend_can(_project(backend="axolotl", python="/p"), _delta("kto"))
    (finding,) = backend_can(_project(backend="axolotl", python="/p", replay_loss="ce"), _delta())
    assert "finish_share = 0.25 is not used" in finding.text
    assert backend_can(_project(method="sft+dpo", start="current"), _delta("sft+dpo")) == []
