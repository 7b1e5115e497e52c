"""The real recogniser of names: presidio-analyzer over spaCy's small English model, as `make names` installs them."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from labeling import name_recogniser as module
from labeling.name_recogniser import NameModelUnfit, NameRecogniser, NameRecogniserMissing, model_folder, names_python
from labeling.redaction.redactor import Redactor
from labeling.settings import RedactionSettings
from service.bench import redaction as bench
from service.commands.doctor import examine
from service.settings import Settings

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def model() -> Path:
    folder = bench.small_model()
    assert folder is not None, "there is no recogniser: run `make names`"
    return folder


@pytest.fixture(scope="module")
def recogniser(model: Path) -> Iterator[NameRecogniser]:
    made = NameRecogniser(model)
    yield made
    made.close()


def found(recogniser: NameRecogniser, *texts: str) -> list[list[str]]:
    places = recogniser.find(texts)
    return [[text[start:end] for start, end in ranges] for text, ranges in zip(texts, places, strict=True)]


def test_it_finds_names(recogniser: NameRecogniser) -> None:
    """In each text of a request, with places in characters whatever stands before them."""
    texts = ("My name is John Smith.", "nothing here", "", "\U0001f600 I spoke with Emma Johnston.\ud83d")
    assert found(recogniser, *texts) == [["John Smith"], [], [], ["Emma Johnston"]]
    assert recogniser.check().startswith("en_core_web_sm")


def test_hostile_texts_are_read(recogniser: NameRecogniser) -> None:
    """An answer to each, in time; none ends the child."""
    texts = [
        "A" * 200_000,
        "Anna " * 20_000,
        "\x00\ufffe",
        "((((" * 5_000,
        "\u202e\u0301" * 500 + "a",
        "<NAME_1> " * 2_000,
    ]
    assert len(recogniser.find(texts)) == len(texts)
    child = recogniser._child
    assert child is not None
    assert child.process.poll() is None


def test_an_exchange_is_stable(model: Path) -> None:
    """Redacted again, the labelled texts of the bench stay as they are: a label trains what was shown."""
    redactor = Redactor(RedactionSettings(names_model_dir=model))
    texts = [text.text for text in bench.load(bench.NAMES)][:60]
    once = redactor.open().exchange([], "", texts)
    again = redactor.open().exchange([], "", once.others)
    assert again.others == once.others
    assert once.counts["name"] > 30
    module.close_all()


def test_the_bars_of_the_bench_are_met() -> None:
    """Precision and recall of names, on texts that our own code was not tuned on."""
    figures = {figure.figure: figure for figure in bench.run(lambda _: None)}
    for name in ("redaction_names_precision", "redaction_names_recall"):
        assert figures[name].met, figures[name]


@pytest.mark.parametrize(("change", "reason"), [("no_ner", "no label for persons"), ("broken", "can't be used")])
def test_a_model_that_finds_no_persons_is_refused(model: Path, tmp_path: Path, change: str, reason: str) -> None:
    """When it is loaded, and not by finding nothing."""
    folder = tmp_path / "model"
    shutil.copytree(model_folder(model), folder)
    if change == "broken":
        (folder / "ner" / "model").write_bytes(b"no weights")
    else:
        config = (folder / "config.cfg").read_text()
        pipeline = '["tok2vec","tagger","parser","senter","attribute_ruler","lemmatizer","ner"]'
        assert pipeline.replace(",", ", ") in config or pipeline in config
        for written in (pipeline, pipeline.replace(",", ", ")):
            config = config.replace(written, '["tok2vec","tagger"]')
        (folder / "config.cfg").write_text(config)
    refusing = NameRecogniser(folder)
    with pytest.raises(NameModelUnfit, match=reason) as raised:
        refusing.check()
    assert "names_model_dir" in raised.value.hint


def test_a_python_without_the_packages_is_named(model: Path) -> None:
    """With the cure; the name of the package stands in the message."""
    bare = NameRecogniser(model, python=sys.executable)
    with pytest.raises(NameRecogniserMissing, match=r"(?:spacy|presidio_analyzer) is not installed") as raised:
        bare.check()
    assert "make names" in raised.value.hint


def test_the_child_stays_offline_and_prints_nothing_else(model: Path) -> None:
    """No look-up and no connection from within; what a library prints comes between no two lines of ours."""
    code = f"""
import runpy, socket, sys
child = runpy.run_path({str(module.CHILD)!r})
channel = child["_own_stdout"]()
sys.addaudithook(child["_stay_offline"])
print("printed by the way")
told = []
for call in (lambda: socket.create_connection(("127.0.0.1", 9)), lambda: socket.getaddrinfo("localhost", 80)):
    try:
        call()
    except PermissionError as error:
        told.append(str(error))
child["_tell"](channel, {{"told": told}})
"""
    done = subprocess.run([names_python(), "-c", code], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == {"told": ["the recogniser of names works offline"] * 2}


def test_torch_is_not_in_the_child(model: Path) -> None:
    """The environment has none: it would cost a second and 200 MB."""
    code = "import presidio_analyzer, spacy, sys; print('torch' in sys.modules)"
    done = subprocess.run([names_python(), "-I", "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"


@pytest.mark.parametrize("works", [True, False])
async def test_doctor_tries_the_model(model: Path, tmp_path: Path, works: bool) -> None:
    """Its name and version where it works, the cure where it does not."""
    redaction = {"names_model_dir": model if works else tmp_path}
    project = {"name": "p", "base_dir": tmp_path, "base_name": "base", "labeling": {"redaction": redaction}}
    settings = Settings.model_validate({"data_dir": tmp_path / "data", "projects": [project]})
    (finding,) = [one for one in await examine(settings) if one.name == "names_model"]
    assert finding.level == ("ok" if works else "trouble")
    assert ("en_core_web_sm" in finding.detail, "names_model_dir" in finding.cure) == (works, not works)
