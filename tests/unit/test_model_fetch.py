"""A base model comes into a folder once: under the hub's real client, from a small hub of our own, and from folders."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import constants

from labeling.errors import InvalidInput, NightschoolError
from loop import model_hub
from loop.adapter_files import base_digest
from loop.base_weights import read_weights
from loop.model_fetch import FolderTaken, NoBaseModel, OwnCode, fetch_from_folder, fetch_from_hub, unfit
from loop.model_hub import HubUnavailable, ModelGated, NoRoom, NoSuchModel, WrongDigest, address_of, list_files
from loop.model_record import ModelRecord, changed_since_fetched, licence, read_record
from tests.bases import write_base
from tests.fakes.model_hub import COMMIT, FakeHub, serving

SECOND = "model-00002-of-00003.safetensors"


@pytest.fixture
def published(tmp_path: Path) -> Path:
    """A repository as they are: with pickles, code, the same weights twice, folders of other formats."""
    folder = write_base(tmp_path / "published", shards=3)
    (folder / "README.md").write_text("---\nlicense: apache-2.0\n---\n# Tiny\n")
    (folder / "LICENSE").write_text("Apache License")
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x04 a pickle")
    (folder / "modeling_tiny.py").write_text("import os")
    (folder / "consolidated.safetensors").write_bytes(b"again")
    (folder / "training_args.bin").write_bytes(b"\x80\x04")
    (folder / "onnx").mkdir()
    (folder / "onnx" / "config.json").write_text("{}")
    return folder


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """The client's own five tries, without its pauses; and no progress bars."""
    monkeypatch.setattr("huggingface_hub.file_download.time.sleep", lambda _: None)
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda _: None)
    monkeypatch.setenv("HF_HUB_DISABLE_PROGRESS_BARS", "1")


@pytest.fixture
def hub(published: Path) -> Iterator[FakeHub]:
    with serving(published) as found:
        yield found


def fetched(hub: FakeHub, to: Path, page: str = "") -> ModelRecord:
    return fetch_from_hub(list_files(address_of(page or hub.page, None)), to, lambda line: None)


def test_only_what_a_base_is_made_of_comes(hub: FakeHub, published: Path, tmp_path: Path) -> None:
    """No pickle, no code, no second copy; a record with source, licence and digests; nothing else left behind."""
    to = tmp_path / "models" / "tiny"
    record = fetched(hub, to)
    assert {path.name for path in to.iterdir()} == {
        *("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"),
        *("README.md", "LICENSE", "nightschool-model.json", "model.safetensors.index.json"),
        *(f"model-0000{number}-of-00003.safetensors" for number in (1, 2, 3)),
    }
    assert [path.name for path in to.parent.iterdir()] == ["tiny"]
    assert record == read_record(to)
    assert (record.source.repository, record.source.revision) == ("acme/tiny", COMMIT)
    assert (record.licence, record.licence_files) == ("apache-2.0", ("LICENSE",))
    (published / "consolidated.safetensors").unlink()
    assert record.digest == base_digest(to) == base_digest(published)
    assert record.parameters == read_weights(published).parameters
    assert record.architecture == "LlamaForCausalLM"
    assert unfit(to, record) == []


def test_again_fetches_nothing(hub: FakeHub, tmp_path: Path) -> None:
    """And another model is never put into its place."""
    first = fetched(hub, tmp_path / "tiny")
    hub.asked.clear()
    assert fetched(hub, tmp_path / "tiny") == first
    assert hub.fetched() == []
    with pytest.raises(FolderTaken, match="holds acme/tiny already"):
        fetch_from_folder(write_base(tmp_path / "other"), tmp_path / "tiny", lambda line: None)


def test_a_broken_off_download_goes_on_where_it_was(hub: FakeHub, tmp_path: Path) -> None:
    """The model's folder is not there until all is; files that came whole are not asked for again."""
    hub.cut_after = 700
    with pytest.raises(HubUnavailable, match="broke off") as refused:
        fetched(hub, tmp_path / "tiny")
    assert "again" in refused.value.hint
    assert not (tmp_path / "tiny").exists()
    hub.cut_after = None
    hub.asked.clear()
    fetched(hub, tmp_path / "tiny")
    assert sorted(hub.fetched()) == [f"model-0000{number}-of-00003.safetensors" for number in (1, 2, 3)]


def test_other_bytes_than_listed_are_removed(hub: FakeHub, tmp_path: Path) -> None:
    """Right name, right size, wrong content: a mirror gone bad."""
    hub.other_bytes = True
    with pytest.raises(WrongDigest, match="of acme/tiny is not what"):
        fetched(hub, tmp_path / "tiny")
    assert not list(tmp_path.glob(".tiny.fetching/*.safetensors"))
    hub.other_bytes = False
    fetched(hub, tmp_path / "tiny")


@pytest.mark.parametrize(
    ("faults", "page", "kind", "said", "cure"),
    [
        ({"gated": True}, "", ModelGated, "is gated", "Accept its licence"),
        ({"private": True}, "", NoSuchModel, "there is no model 'acme/tiny'", "HF_TOKEN"),
        ({}, "/acme/nothing", NoSuchModel, "there is no model 'acme/nothing'", "HF_TOKEN"),
        ({}, "/acme/tiny/tree/v9", NoSuchModel, "has no revision 'v9'", "revision"),
        ({"status": 403}, "", ModelGated, "refuses our token", "HF_TOKEN"),
        ({"status": 500}, "", HubUnavailable, "(500)", "again"),
        ({"status": 429}, "", HubUnavailable, "(429)", "again"),
        ({}, "/a/b/c", InvalidInput, "is no name of a model", "owner/name"),
    ],
)
def test_what_the_hub_refuses_has_its_cure(
    hub: FakeHub, tmp_path: Path, faults: dict[str, Any], page: str, kind: type[NightschoolError], said: str, cure: str
) -> None:
    vars(hub).update(faults)
    with pytest.raises(kind) as refused:
        fetched(hub, tmp_path / "tiny", hub.url + (page or "/acme/tiny"))
    assert said in str(refused.value)
    assert cure in refused.value.hint
    assert not (tmp_path / "tiny").exists()


def test_a_hub_that_is_down_is_told(hub: FakeHub, tmp_path: Path) -> None:
    with pytest.raises(HubUnavailable):
        fetched(hub, tmp_path / "tiny", "http://127.0.0.1:9/acme/tiny")


def test_too_large_is_said_before_it_is_fetched(hub: FakeHub, tmp_path: Path) -> None:
    """A petabyte fits nowhere."""
    hub.sizes[SECOND] = 10**15
    with pytest.raises(NoRoom, match=r"1000000\.\d GB are needed"):
        fetched(hub, tmp_path / "tiny")
    assert not [name for name in hub.fetched() if name.endswith(".safetensors")]


def test_a_disk_that_fills_up_meanwhile_is_told(hub: FakeHub, tmp_path: Path) -> None:
    """Files may have a kilobyte here: the system refuses the write as a full disk does."""
    listing = list_files(address_of(hub.page, None))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1_000, hard))
    try:
        with pytest.raises(NoRoom) as refused:
            fetch_from_hub(listing, tmp_path / "tiny", lambda line: None)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "goes on where it was" in refused.value.hint
    fetched(hub, tmp_path / "tiny")


@pytest.mark.parametrize("name", ["config.json", "tokenizer_config.json"])
def test_a_model_with_code_of_its_own_is_refused_before_its_weights_come(
    hub: FakeHub, published: Path, tmp_path: Path, name: str
) -> None:
    content = json.loads((published / name).read_text())
    content["auto_map"] = {"AutoModelForCausalLM": "modeling_tiny.Tiny"}
    (published / name).write_text(json.dumps(content))
    with pytest.raises(OwnCode, match=name) as refused:
        fetched(hub, tmp_path / "tiny")
    assert "auto_map" in refused.value.hint
    assert not [name for name in hub.fetched() if name.endswith((".safetensors", ".py"))]


@pytest.mark.parametrize(
    ("left", "said"),
    [
        (("config.json", "pytorch_model.bin"), r"only as pickles \(pytorch_model.bin\)"),
        (("config.json", "consolidated.safetensors"), r"holds no \*.safetensors"),
        (("model-00001-of-00003.safetensors",), "holds no config.json"),
    ],
)
def test_what_is_no_base_is_refused(
    hub: FakeHub, published: Path, tmp_path: Path, left: tuple[str, ...], said: str
) -> None:
    for path in published.iterdir():
        if path.is_file() and path.name not in left:
            path.unlink()
    with pytest.raises(NoBaseModel, match=said):
        fetched(hub, tmp_path / "tiny")


def test_a_folder_is_copied_as_a_hub_would_give_it(published: Path, tmp_path: Path) -> None:
    """Links of a hub's cache are followed; a copy of a copy keeps the first source."""
    cache = tmp_path / "snapshot"
    cache.mkdir()
    for path in published.iterdir():
        (cache / path.name).symlink_to(path)
    record = fetch_from_folder(cache, tmp_path / "tiny", lambda line: None)
    assert not (tmp_path / "tiny" / "pytorch_model.bin").exists()
    assert not (tmp_path / "tiny" / "config.json").is_symlink()
    (published / "consolidated.safetensors").unlink()
    assert record.digest == base_digest(published)
    again = fetch_from_folder(tmp_path / "tiny", tmp_path / "second", lambda line: None)
    assert again.source == record.source
    assert again.source.where == str(cache.resolve())


def test_a_copy_of_a_changed_folder_is_refused(published: Path, tmp_path: Path) -> None:
    """Its record says what it was; the same size does not help."""
    origin = tmp_path / "tiny"
    fetch_from_folder(published, origin, lambda line: None)
    weights = origin / SECOND
    weights.write_bytes(weights.read_bytes()[:-2] + b"\1\2")
    assert changed_since_fetched(origin) == []
    with pytest.raises(WrongDigest, match="no longer what was fetched"):
        fetch_from_folder(origin, tmp_path / "second", lambda line: None)
    assert not (tmp_path / "second").exists()
    (origin / "chat_template.jinja").write_text("longer than it was, by far " * 99)
    (origin / "generation_config.json").unlink()
    assert changed_since_fetched(origin) == ["chat_template.jinja", "generation_config.json"]


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("---\nlicense: mit\n---\n", "mit"),
        ("---\ntags:\n- a\nlicense: other\nlicense_name: llama3.2\n---\n", "llama3.2"),
        ('---\nlicense: "cc-by-4.0"\n---\n', "cc-by-4.0"),
        ("# No front matter\nlicense: mit\n", ""),
        ("---\nlicense: mit\n", ""),
    ],
)
def test_the_licence_is_read_from_the_models_card(tmp_path: Path, text: str, found: str) -> None:
    (tmp_path / "README.md").write_text(text)
    assert licence(tmp_path) == found


def test_addresses() -> None:
    """Names, pages, pages of a revision; a token never leaves for an address that somebody pasted."""
    assert address_of("acme/tiny", None) == model_hub.Address("acme/tiny")
    assert address_of("acme/tiny", "v1").revision == "v1"
    found = address_of("https://hub.example/acme/tiny/tree/feature/x", None)
    assert (found.repository, found.revision, found.endpoint) == ("acme/tiny", "feature/x", "https://hub.example")
    own = address_of(f"{constants.ENDPOINT}/acme/tiny", None)
    assert own.endpoint is None
    for text in ("ftp://hub.example/a/b", "https:///a/b", "https://user@hub.example/a/b"):
        with pytest.raises(InvalidInput):
            address_of(text, None)


def run(*arguments: str, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    root = Path(__file__).parent.parent.parent
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    return subprocess.run(
        [sys.executable, "-m", "service.cli", "model", *arguments],
        cwd=cwd, env={**inherited, "PYTHONPATH": str(root), **environment}, capture_output=True, text=True, check=False,
    )  # fmt: skip


def test_the_command_with_the_environments_hub_and_token(hub: FakeHub, tmp_path: Path) -> None:
    """HF_ENDPOINT and HF_TOKEN count; a refused token is told in two lines; afterwards all is offline."""
    hub.token = "t0ken"
    home = {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "hf")}
    refused = run("fetch", "acme/tiny", cwd=tmp_path, **home)
    assert refused.returncode == 1
    assert "Traceback" not in refused.stderr
    assert "HF_TOKEN" in refused.stderr
    pasted = run("fetch", hub.page.replace("127.0.0.1", "localhost"), cwd=tmp_path, **home, HF_TOKEN="t0ken")
    assert pasted.returncode == 1, "another address must not see the token"
    made = run("fetch", "acme/tiny", cwd=tmp_path, **home, HF_TOKEN="t0ken")
    assert made.returncode == 0, made.stderr
    assert 'base_dir = "models/tiny"' in made.stdout
    offline = run("fetch", "acme/tiny", "--to", "other", cwd=tmp_path, **home, HF_TOKEN="t0ken", HF_HUB_OFFLINE="1")
    assert "HF_HUB_OFFLINE is set" in offline.stderr
    shown = run("show", "models/tiny", "--verify", cwd=tmp_path)
    for part in ("acme/tiny at", "apache-2.0", "LlamaForCausalLM (llama)", "in BF16", "sha256:"):
        assert part in shown.stdout, part
    weights = tmp_path / "models" / "tiny" / SECOND
    weights.write_bytes(weights.read_bytes()[:-2] + b"\1\2")
    damaged = run("show", "models/tiny", "--verify", cwd=tmp_path)
    assert damaged.returncode == 1
    assert f"{SECOND} of models/tiny are not what was fetched" in damaged.stderr


def test_show_of_a_plain_folder(published: Path, tmp_path: Path) -> None:
    """What the files say, and that nobody recorded where they are from."""
    shown = run("show", str(published), "--json", cwd=tmp_path)
    assert json.loads(shown.stdout)["licence"] == "apache-2.0"
    (published / "chat_template.jinja").unlink()
    told = run("show", str(published), cwd=tmp_path).stdout
    assert "no record here" in told
    assert "warning: it has no chat template" in told
    assert run("show", "nowhere", cwd=tmp_path).returncode == 1
