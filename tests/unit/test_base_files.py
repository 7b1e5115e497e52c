"""A base's folder before it is trained on: weights missing or cut, tokenizers that do not fit, whose chat template."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from loop.base_weights import BaseDamaged, read_weights
from loop.chat_template import (
    BadTemplateFile,
    TemplateChanged,
    answering_digest,
    chat_template,
    require_same_template,
    tokenizer_folder,
)
from loop.engine_process import engine_command
from loop.plain_lora import BaseMissing
from loop.settings import EngineSettings, ProjectSettings
from loop.tokenizer_files import TokenizerUnfit, harmless, problems, read_tokenizer
from service.settings import SettingsError, load
from tests.bases import ROWS, WORDS, write_base


def edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def cut(path: Path, left: int) -> None:
    path.write_bytes(path.read_bytes()[:left])


def test_whole_weights_are_counted(tmp_path: Path) -> None:
    """One file or shards: the same parameters, and the embedding's rows."""
    one, two = read_weights(write_base(tmp_path / "one")), read_weights(write_base(tmp_path / "two", shards=3))
    assert one.parameters == two.parameters == 16 * 16 + 16 + 2 * (768 + 3 * 384 + 32)
    assert (one.embedding_rows, one.dtypes) == (ROWS, ("BF16",))
    assert len(two.files) == 3


SECOND = "model-00002-of-00003.safetensors"
INDEX = "model.safetensors.index.json"


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda f: (f / SECOND).unlink(), f"{INDEX} names {SECOND}"),
        (lambda f: ((f / SECOND).unlink(), (f / INDEX).unlink()), f"other shards' names ask for {SECOND}"),
        (lambda f: cut(f / SECOND, -100), "100 are missing, as after a download that was broken off"),
        (lambda f: cut(f / SECOND, 5), "is cut short: 5 bytes"),
        (lambda f: (f / SECOND).write_text("version https://git-lfs.x/spec/v1\noid x"), "is a Git LFS pointer"),
        (lambda f: (f / SECOND).write_text("<html>404</html>" * 9), "a header of"),
        (lambda f: (f / "x.safetensors.incomplete").touch(), "is a download that was broken off"),
        (lambda f: edit(f / INDEX, weight_map={"a.weight": SECOND}), "a.weight is not in"),
        (lambda f: edit(f / INDEX, weight_map={"a.weight": "../x.safetensors"}), "no file of this folder"),
        (lambda f: (f / INDEX).write_text("[]"), "is not an index"),
        (lambda f: edit(f / "config.json", num_hidden_layers=3), "says 3 layers, and layer 2 has no weights"),
    ],
)  # fmt: skip
def test_damage_is_named(tmp_path: Path, damage: Callable[[Path], object], said: str) -> None:
    """The file, what is wrong with it, and that fetching goes on where it was."""
    folder = write_base(tmp_path / "base", shards=3)
    damage(folder)
    with pytest.raises(BaseDamaged) as refused:
        read_weights(folder)
    assert said in str(refused.value)
    assert refused.value.hint


def test_room_that_was_set_aside_is_no_download(tmp_path: Path) -> None:
    """The right size and nothing in it."""
    folder = write_base(tmp_path / "base", rows=100_000)
    path = folder / "model.safetensors"
    with path.open("r+b") as file:
        file.seek(10_000)
        file.write(bytes(path.stat().st_size - 10_000))
    with pytest.raises(BaseDamaged, match="mostly zeros"):
        read_weights(folder)


def test_pickles_are_no_weights(tmp_path: Path) -> None:
    folder = write_base(tmp_path / "base")
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(BaseMissing, match="only as pickles"):
        read_weights(folder)


def wrong_with(folder: Path) -> list[str]:
    tokenizer = read_tokenizer(folder)
    assert tokenizer is not None
    config = json.loads((folder / "config.json").read_text())
    return problems(tokenizer, read_weights(folder).embedding_rows, config["vocab_size"])


def test_a_sound_tokenizer_is_told_with_its_harmless_differences(tmp_path: Path) -> None:
    """Several ends are normal, and padding with the end is no trouble here."""
    folder = write_base(
        tmp_path / "base", tokenizer={"pad_token": "<end>", "bos_token": "<user>"}, generation={"eos_token_id": [1, 4]},
        config={"bos_token_id": 3, "unk_token_id": -1},
    )  # fmt: skip
    assert wrong_with(folder) == []
    tokenizer = read_tokenizer(folder)
    assert tokenizer is not None
    told = " | ".join(harmless(tokenizer, ROWS))
    assert "eos is 1 in config.json, 1 and 4 in generation_config.json" in told
    assert "bos is 3 in config.json, 2 in tokenizer_config.json: harmless" in told
    assert "pad and eos are one token" in told
    assert "4 rows of the embedding have no token" in told


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"rows": 9}, "3 tokens have no row in the embedding, which has 9: 9 'did', 10 'Hello', 11 '42'"),
        ({"config": {"vocab_size": 20}}, "config.json says vocab_size 20; the embedding has 16 rows"),
        ({"tokenizer": {"eos_token": "<|eot|>"}}, "names '<|eot|>' as eos, which tokenizer.json does not hold"),
        ({"config": {"pad_token_id": 99}}, "config.json: pad_token_id 99 has no row"),
        (
            {"tokenizer": {"added_tokens_decoder": {"1": {"content": "</s>", "special": True}}}},
            "id 1 is '</s>' in tokenizer_config.json and '<end>' in tokenizer.json",
        ),
        (
            {"tokenizer": {"added_tokens_decoder": {"14": {"content": "<end>", "special": True}}}},
            "'<end>' is id 14 in tokenizer_config.json and id 1 in tokenizer.json",
        ),
        (
            {"tokenizer": {"added_tokens_decoder": {"31": {"content": "<tool>", "special": True}}}},
            "1 tokens have no row in the embedding, which has 16: 31 '<tool>'",
        ),
        (
            {"config": {"eos_token_id": None}, "generation": {"eos_token_id": None}, "tokenizer": {"eos_token": None}},
            "no file names an end-of-sequence token",
        ),
    ],
)
def test_a_tokenizer_that_does_not_fit_is_named(tmp_path: Path, options: dict[str, Any], said: str) -> None:
    """Each would end in an index out of range, a model that never stops, or noise."""
    assert said in " | ".join(wrong_with(write_base(tmp_path / "base", **options)))


def test_two_words_with_one_id(tmp_path: Path) -> None:
    folder = write_base(tmp_path / "base")
    content = json.loads((folder / "tokenizer.json").read_text())
    content["model"]["vocab"]["twin"] = WORDS.index("did")
    (folder / "tokenizer.json").write_text(json.dumps(content))
    assert "tokens 'did' and 'twin' of tokenizer.json share id 9" in wrong_with(folder)


@pytest.mark.parametrize("content", ["{}", "[]", "{", '{"model": {"vocab": 3}, "added_tokens": []}'])
def test_what_is_no_tokenizer_is_refused(tmp_path: Path, content: str) -> None:
    folder = write_base(tmp_path / "base")
    (folder / "tokenizer.json").write_text(content)
    with pytest.raises(TokenizerUnfit):
        read_tokenizer(folder)


def test_no_tokenizer_at_all(tmp_path: Path) -> None:
    """Not even one that tokenizer.json could be made of."""
    folder = write_base(tmp_path / "base")
    (folder / "tokenizer.json").unlink()
    with pytest.raises(TokenizerUnfit, match="holds no tokenizer"):
        read_tokenizer(folder)
    (folder / "tokenizer.model").touch()
    assert read_tokenizer(folder) is None


def test_the_templates_place_decides(tmp_path: Path) -> None:
    """The project's file, the base's file, the tokenizer's key: in this order, each with its own digest."""
    bare = write_base(tmp_path / "bare", template=None)
    assert chat_template(bare) is None
    for listed in (
        "from config",
        [{"name": "tool_use", "template": "x"}, {"name": "default", "template": "from config"}],
    ):
        edit(bare / "tokenizer_config.json", chat_template=listed)
        found = chat_template(bare)
        assert found is not None
        assert (found.text, found.source.name) == ("from config", "tokenizer_config.json")
    (bare / "chat_template.jinja").write_text("from file\n")
    own = tmp_path / "own.jinja"
    own.write_text("from file\r\n")
    in_file, of_project = chat_template(bare), chat_template(bare, own)
    assert in_file is not None
    assert of_project is not None
    assert (in_file.text, of_project.text) == ("from file\n", "from file\r\n")
    assert in_file.digest != of_project.digest, "byte for byte"


@pytest.mark.parametrize("content", [None, b"", b" \n", b"\xff\xfe"])
def test_a_template_file_that_is_none_is_refused(tmp_path: Path, content: bytes | None) -> None:
    own = tmp_path / "own.jinja"
    if content is not None:
        own.write_bytes(content)
    with pytest.raises(BadTemplateFile):
        chat_template(write_base(tmp_path / "base"), own)


def test_a_projects_template_goes_wherever_its_text_counts(tmp_path: Path) -> None:
    """On vLLM's command line, in lm-eval's tokenizer, in the key of the base's answers; edited, it stops the exam."""
    base, own = write_base(tmp_path / "base"), tmp_path / "own.jinja"
    own.write_text("{{ messages }}")
    plain = ProjectSettings(name="bot", base_dir=base, base_name="b")
    project = plain.model_copy(update={"chat_template": own})
    command = engine_command(EngineSettings(), base, "b", 1, project.chat_template)
    assert command[command.index("--chat-template") + 1] == str(own)
    assert "--chat-template" not in engine_command(EngineSettings(), base, "b", 1, None)
    folder = tokenizer_folder(base, own, tmp_path / "tokenizer")
    assert (folder / "chat_template.jinja").read_text() == "{{ messages }}"
    assert (folder / "tokenizer.json").read_bytes() == (base / "tokenizer.json").read_bytes()
    assert tokenizer_folder(base, None, tmp_path / "unused") == base
    assert answering_digest(plain, "sha256:b") == "sha256:b"
    before = answering_digest(project, "sha256:b")
    digest = chat_template(base, own)
    assert digest is not None
    require_same_template(project, digest.digest)
    own.write_text("{{ messages }} ")
    assert answering_digest(project, "sha256:b") != before
    with pytest.raises(TemplateChanged):
        require_same_template(project, digest.digest)


SETTINGS = '[[projects]]\nname = "{}"\nbase_dir = "b"\nbase_name = "base"\nchat_template = "{}"\n'


def test_the_settings_template_is_a_path_and_one_for_all(tmp_path: Path) -> None:
    """Relative to the file, like every path; one engine serves all projects."""
    path = tmp_path / "nightschool.toml"
    path.write_text(SETTINGS.format("one", "t.jinja") + SETTINGS.format("two", "t.jinja"))
    assert load(path).projects[0].chat_template == tmp_path / "t.jinja"
    path.write_text(SETTINGS.format("one", "t.jinja") + SETTINGS.format("two", "u.jinja"))
    with pytest.raises(SettingsError, match="share one engine, and so one chat_template"):
        load(path)
