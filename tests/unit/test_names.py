"""People's names: what of a model's places is replaced, who is whom, and that nothing goes on where no model answers.

The recogniser is a fake child here; `tests/contract/test_name_recogniser.py` has the real one.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from labeling import name_recogniser as module
from labeling import pull as pull_module
from labeling.database import Database, now
from labeling.errors import NightschoolError
from labeling.feedback import fold
from labeling.label_studio import SeenAnnotation, SeenTask
from labeling.labeling_screen import Opinion, as_result
from labeling.name_recogniser import (
    FAILURES,
    NameModelUnfit,
    NameRecogniser,
    NameRecogniserMissing,
    NamesNotRead,
    NamesUnavailable,
    model_folder,
)
from labeling.pull import PullReport
from labeling.queue_report import queue_report
from labeling.redacted_items import bring_up_to_date, redacted_opinions
from labeling.redaction.redactor import Redacted, Redactor, redactor
from labeling.settings import LabelingSettings, RedactionSettings
from labeling.tables import Annotation, Feedback, GoodAnswer, ItemState, LabelState, ReviewItem, Verdict
from loop.training_examples import redacted_good_answers, redacted_labels
from service.health import readiness
from service.installation import compose
from service.metrics import Metrics
from service.settings import Settings, load
from service.stack import Stack
from tests.running import PROJECT, rows
from tests.unit.test_entry import feedback, next_day, store
from tests.unit.test_hooks import installed
from tests.unit.test_redacted_queue import label

FAKE = Path(__file__).parent.parent / "fakes" / "name_recogniser.py"
Model = Callable[..., Path]
STACK = Stack((), "http://127.0.0.1:9", "0" * 40, "http://127.0.0.1:9")


@pytest.fixture
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Model]:
    """Makes a folder whose fake recogniser knows these names."""
    monkeypatch.setattr(module, "CHILD", FAKE)
    monkeypatch.setattr(module, "names_python", lambda: sys.executable)

    def make(*names: str, behaviour: str = "", folder: str = "model") -> Path:
        made = tmp_path / folder
        made.mkdir()
        for name, text in (("config.cfg", ""), ("meta.json", "{}"), ("names.json", json.dumps(names))):
            (made / name).write_text(text, encoding="utf-8")
        (made / "behaviour.txt").write_text(behaviour)
        return made

    yield make
    module.close_all()


def exchange(settings: RedactionSettings, prompt: str, answer: str = "", *others: str) -> Redacted:
    return Redactor(settings).open().exchange([{"role": "user", "content": prompt}], answer, others)


def redact(folder: Path, text: str, **settings: Any) -> str:
    found = exchange(RedactionSettings(names_model_dir=folder, **settings), text)
    return str(found.messages[0]["content"])


def starts(folder: Path) -> int:
    return len((folder / "starts.txt").read_text().splitlines())


# What becomes of a place that the model gives.


@pytest.mark.parametrize(
    ("model_sees", "text", "redacted"),
    [
        ("Anna Virtanen's", "Anna Virtanen's order", "<NAME_1>'s order"),
        ("Emma Johnston\nTel", "Regards\nEmma Johnston\nTel. 12", "Regards\n<NAME_1>\nTel. 12"),
        ("Regards\nEmma Johnston", "Regards\nEmma Johnston", "Regards\n<NAME_1>"),
        ("anna@shop.example", "anna@shop.example wrote", "<EMAIL_1> wrote"),
        ("Anna <anna@shop.example>", "Anna <anna@shop.example>", "<NAME_1> <<EMAIL_1>>"),
        ("<EMAIL_7> Bob", "<EMAIL_7> Bob", "<EMAIL_7> <NAME_1>"),
        ('"Bob"', 'I met "Bob".', 'I met "<NAME_1>".'),
        ("O'Brien", "Ask O'Brien.", "Ask <NAME_1>."),
        ("XR-200", "the XR-200 broke", "the XR-200 broke"),
        ("user_name", "set user_name now", "set user_name now"),
        ("a b c d e f g", "a b c d e f g", "a b c d e f g"),
        ("X", "X is it", "X is it"),
        ("李小龙", "我是李小龙。", "我是<NAME_1>。"),
    ],
)
def test_places_become_what_is_to_be_replaced(model: Model, model_sees: str, text: str, redacted: str) -> None:
    """Not over the end of a line, nor what another kind has claimed, nor a possessive, nor what is no name."""
    assert redact(model(model_sees), text) == redacted


@pytest.mark.parametrize("off", [{"leave_out": ("name",)}, {"enabled": False}, {"names_model_dir": None}])
def test_names_can_be_left_out(model: Model, off: dict[str, Any]) -> None:
    """Then no recogniser is started either."""
    folder = model("Anna")
    settings = RedactionSettings.model_validate({"names_model_dir": folder, **off})
    assert exchange(settings, "Anna is here").messages[0]["content"] == "Anna is here"
    assert not (folder / "starts.txt").exists()


def test_public_names_stay(model: Model) -> None:
    folder = model("Marie Curie", "Anna")
    assert redact(folder, "Did Anna know Marie Curie?", keep=("marie curie",)) == "Did <NAME_1> know Marie Curie?"


# Who is whom.


@pytest.mark.parametrize(
    ("names", "prompt", "answer", "redacted"),
    [
        (["Anna Virtanen", "Anna"], "Anna Virtanen wrote.", "Hello Anna", "Hello <NAME_1>"),
        (["Anna", "Anna Virtanen"], "Anna wrote.", "It is Anna Virtanen", "It is <NAME_1>"),
        (["Virtanen, Anna", "Anna Virtanen"], "Virtanen, Anna", "ANNA VIRTANEN or Anna Virtanen", None),
        (["Anna Virtanen", "Anna Berg", "Anna"], "Anna Virtanen, Anna Berg", "Hi Anna", "Hi <NAME_3>"),
        (["Anna Virtanen", "Bob"], "Anna Virtanen", "Hi Bob", "Hi <NAME_2>"),
        (["Anna Virtanen"], "Anna Virtanen", "Hello Anna, as Virtanen said", "Hello <NAME_1>, as <NAME_1> said"),
        (["Will Smith"], "Will Smith", "Will you wait, Will?", "Will you wait, <NAME_1>?"),
        (["Will Smith"], "Will Smith", "I will ask the smith.", "I will ask the smith."),
    ],
)
def test_one_person_has_one_placeholder(
    model: Model, names: list[str], prompt: str, answer: str, redacted: str | None
) -> None:
    """Also by a part of the name, where only one person has it, and where the model sees the full name only."""
    found = exchange(RedactionSettings(names_model_dir=model(*names)), prompt, answer)
    assert found.answer == (redacted or "ANNA VIRTANEN or <NAME_1>")


def test_names_are_counted_and_stable(model: Model) -> None:
    """Redacted again, nothing changes; in JSON names are replaced value by value."""
    settings = RedactionSettings(names_model_dir=model("Anna Virtanen", "Anna"))
    tool_call = '{"to": "Anna", "card": 4111111111111111}'
    found = exchange(settings, "Anna Virtanen, card 4111 1111 1111 1111", tool_call, "Anna?")
    assert found.answer == '{"to": "<NAME_1>", "card": "<CARD_1>"}'
    assert found.counts == {"name": 3, "card": 2}
    again = Redactor(settings).open().exchange(found.messages, found.answer, found.others)
    assert (again.messages, again.answer, again.others, again.counts) == (
        found.messages,
        found.answer,
        found.others,
        {},
    )


def test_a_name_that_shows_only_between_placeholders_goes_too(model: Model) -> None:
    """The redacted text is looked at again: later looks, at push and before training, find nothing new."""
    settings = RedactionSettings(names_model_dir=model("<EMAIL_1> Bob"))
    found = exchange(settings, "to anna@shop.example Bob")
    assert found.messages[0]["content"] == "to <EMAIL_1> <NAME_1>"
    assert found.counts == {"email": 1, "name": 1}


# The child.


def test_texts_of_an_exchange_are_asked_together(model: Model) -> None:
    """One request for all, each text once; long texts in pieces, and what has no letters not at all."""
    folder = model("Anna")
    exchange(RedactionSettings(names_model_dir=folder), "one", "two", "three", "two", "17")
    assert (folder / "asked.txt").read_text().splitlines() == ["3 11"]


def test_long_texts_are_read_in_pieces(model: Model) -> None:
    """Cut where no name stands; places are those of the whole text; no request is larger than its limit."""
    folder = model("Anna Virtanen")
    line = "x " * 40 + "Anna Virtanen\n"
    text = line * 2_000
    (found,) = NameRecogniser(folder).find([text])
    assert found == [match.span() for match in re.finditer("Anna Virtanen", text)]
    sizes = [int(size.split()[1]) for size in (folder / "asked.txt").read_text().splitlines()]
    assert sum(sizes) == len(text)
    assert max(sizes) <= module.REQUEST_CHARACTERS


def test_halves_of_characters_move_no_place(model: Model) -> None:
    """Two of them in a row would be one character once they went through JSON."""
    text = "\ud83d\ude00 \ud83d Anna"
    (found,) = NameRecogniser(model("Anna")).find([text])
    assert [text[start:end] for start, end in found] == ["Anna"]


@pytest.mark.parametrize("bad", ["CRASH", "HANG", "GARBAGE", "SHIFT", "FAIL"])
def test_no_answer_is_never_no_names(model: Model, bad: str) -> None:
    """An error, that is counted and says nothing of the text; the next text is answered, by a new child if need be."""
    folder = model("Anna")
    recogniser = NameRecogniser(folder, answer_seconds=1)
    before = FAILURES["names_not_read"]
    with pytest.raises(NamesNotRead) as raised:
        recogniser.find([f"Anna said {bad}"])
    assert "Anna" not in str(raised.value)
    assert FAILURES["names_not_read"] == before + 1
    assert recogniser.find(["Anna"]) == [[(0, 4)]]
    assert starts(folder) == (1 if bad == "FAIL" else 2)
    recogniser.close()
    assert 'nightschool_names_not_recognised_total{reason="names_not_read"}' in Metrics().render()[0].decode()


@pytest.mark.parametrize(
    ("behaviour", "error"),
    [
        ("missing", NameRecogniserMissing),
        ("unfit", NameModelUnfit),
        ("die", NamesUnavailable),
        ("hang", NamesUnavailable),
    ],
)
def test_a_child_that_does_not_start_says_why(
    model: Model, behaviour: str, error: type[NightschoolError], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the cure. Who asks again at once gets the same answer and starts no other; later it is tried again."""
    folder = model("Anna", behaviour=behaviour)
    recogniser = NameRecogniser(folder, start_seconds=0.5 if behaviour == "hang" else 20, answer_seconds=1)
    for _ in range(3):
        with pytest.raises(error) as raised:
            recogniser.find(["Anna"])
        assert raised.value.hint
    with pytest.raises(error):
        recogniser.last_known()
    assert behaviour == "hang" or starts(folder) == 1
    (folder / "behaviour.txt").write_text("")
    monkeypatch.setattr(module, "RETRY_SECONDS", 0)
    assert recogniser.find(["Anna"]) == [[(0, 4)]]
    assert recogniser.last_known() == "fake 1 (spaCy 0)"
    recogniser.close()


def test_a_python_that_is_not_there_is_named(model: Model) -> None:
    with pytest.raises(NameRecogniserMissing, match="no/python"):
        NameRecogniser(model("Anna"), python="no/python").check()


def test_a_child_that_was_killed_is_replaced(model: Model) -> None:
    folder = model("Anna")
    recogniser = NameRecogniser(folder)
    assert recogniser.find(["Anna"]) == [[(0, 4)]]
    pid = int((folder / "starts.txt").read_text())
    os.kill(pid, signal.SIGKILL)
    deadline = time.monotonic() + 10
    while Path(f"/proc/{pid}/stat").read_text().split()[2] != "Z" and time.monotonic() < deadline:
        time.sleep(0.01)
    assert recogniser.find(["Anna"]) == [[(0, 4)]]
    recogniser.close()


def test_the_child_ends_with_its_parent(model: Model) -> None:
    """Also when the parent is killed: end of file on its stdin."""
    folder = model("Anna")
    code = f"""
import time
from pathlib import Path
from labeling import name_recogniser as module
module.CHILD = Path({str(FAKE)!r})
module.names_python = lambda: {sys.executable!r}
module.NameRecogniser(Path({str(folder)!r})).find(["Anna"])
print("asked", flush=True)
time.sleep(60)
"""
    parent = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, cwd=FAKE.parent.parent.parent)
    assert parent.stdout is not None
    assert parent.stdout.readline() == b"asked\n"
    child = int((folder / "starts.txt").read_text())
    parent.kill()
    parent.wait()
    deadline = time.monotonic() + 10
    while is_alive(child):
        assert time.monotonic() < deadline
        time.sleep(0.02)


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.parametrize("missing", ["config.cfg", "meta.json"])
def test_a_folder_without_a_pipeline_is_refused(model: Model, missing: str) -> None:
    folder = model("Anna")
    (folder / missing).unlink()
    with pytest.raises(NameModelUnfit, match=missing):
        NameRecogniser(folder).check()


def test_a_model_package_is_a_folder_too(tmp_path: Path) -> None:
    """Unpacked or installed, it keeps the pipeline one folder below."""
    inner = tmp_path / "en_core_web_sm-3.8.0"
    inner.mkdir()
    (tmp_path / "meta.json").write_text("{}")
    for name in ("config.cfg", "meta.json"):
        (inner / name).write_text("")
    assert model_folder(tmp_path) == inner


# The queue.


def settings_for(folder: Path) -> LabelingSettings:
    return LabelingSettings(held_out_share=0, redaction=RedactionSettings(names_model_dir=folder))


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "RETRY_SECONDS", 0)


async def test_an_item_holds_no_name(database: Database, model: Model) -> None:
    """Two prompts that differ in a name only are one item."""
    await store(database, feedback("I am Anna, when?"), feedback("I am Bob, when?"))
    assert await fold(database, PROJECT, settings_for(model("Anna", "Bob"))) == 2
    (item,) = await rows(database, ReviewItem)
    assert (item.count, item.messages[0]["content"], item.redacted) == (2, "I am <NAME_1>, when?", {"name": 1})


@pytest.mark.parametrize("behaviour", ["die", "missing", "unfit"])
async def test_without_a_recogniser_nothing_is_folded(
    database: Database, model: Model, behaviour: str, impatient: None
) -> None:
    """It waits, unfolded, and is folded by the first look after the recogniser works."""
    folder = model("Anna", behaviour=behaviour)
    settings = settings_for(folder)
    await store(database, feedback("I am Anna"), feedback("no name at all"))
    for _ in range(2):
        with pytest.raises(NightschoolError):
            await fold(database, PROJECT, settings)
    assert await rows(database, ReviewItem) == []
    assert [(row.folded_at, row.held_until) for row in await rows(database, Feedback)] == [(None, None)] * 2
    (folder / "behaviour.txt").write_text("")
    assert await fold(database, PROJECT, settings) == 2


async def test_a_text_that_cannot_be_read_holds_up_no_other(
    database: Database, model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is held back for a while and shown as such; once it can be read it is folded, redacted."""
    folder = model("Anna")
    settings = settings_for(folder)
    await store(database, feedback("Anna CRASH"), feedback("I am Anna"))
    assert await fold(database, PROJECT, settings) == 1
    assert [item.messages[0]["content"] for item in await rows(database, ReviewItem)] == ["I am <NAME_1>"]
    report = await queue_report(database, PROJECT)
    assert report["entry"]["held_back"]["names"]["waiting"] == 1
    assert await fold(database, PROJECT, settings) == 0
    await next_day(database)
    quiet = model("Anna CRASH", folder="quiet")
    monkeypatch.setattr(module, "CHILD", quiet / "child.py")
    module.CHILD.write_text(FAKE.read_text().replace('"CRASH" in said', "False"))
    assert await fold(database, PROJECT, settings_for(quiet)) == 1
    assert len(await rows(database, ReviewItem)) == 2


async def test_what_was_folded_before_is_not_sent_unread(database: Database, model: Model) -> None:
    """Items from before names were replaced: redacted now, or not among those that may be shown."""
    await store(database, feedback("I am Anna"), feedback("Anna CRASH"))
    await fold(database, PROJECT, LabelingSettings(held_out_share=0))
    items = await rows(database, ReviewItem)
    fit = await bring_up_to_date(database, items, settings_for(model("Anna")).redaction)
    assert [item.messages[0]["content"] for item in fit] == ["I am <NAME_1>"]


def test_labellers_texts_and_training_rows_without_names(model: Model) -> None:
    """What can't be read is missing, never raw."""
    settings = RedactionSettings(names_model_dir=model("Anna"))
    item = ReviewItem(project="p", prompt_digest="d", messages=[{"role": "user", "content": "q"}], answer="a")
    said = {1: (item, Opinion("wrong", "Ask Anna.", ())), 2: (item, Opinion("wrong", "CRASH", ()))}
    assert redacted_opinions(said, settings) == {1: Opinion("wrong", "Ask <NAME_1>.", ())}
    by = redactor(settings)
    labels = [label(flagged_answer="Anna", correction="No"), label(flagged_answer="CRASH", correction="No")]
    (kept,) = redacted_labels(labels, by)
    assert (kept.flagged_answer, kept.state, kept.verdict) == ("<NAME_1>", LabelState.ACCEPTED, Verdict.WRONG)
    answers = [GoodAnswer(project="p", prompt_digest=text, messages=[], answer=text) for text in ("Anna", "CRASH")]
    assert [good.answer for good in redacted_good_answers(answers, by)] == ["<NAME_1>"]
    assert item.state is ItemState.OPEN


# The start.


def configured(tmp_path: Path, names_model_dir: str) -> Settings:
    path = installed(tmp_path, managed=True)
    with path.open("a") as file:
        file.write(f'[projects.labeling.redaction]\nnames_model_dir = "{names_model_dir}"\n')
    return load(path)


@pytest.mark.parametrize(("behaviour", "error"), [("missing", NameRecogniserMissing), ("unfit", NameModelUnfit)])
async def test_a_start_that_could_recognise_nothing_is_refused(
    tmp_path: Path, model: Model, behaviour: str, error: type[NightschoolError]
) -> None:
    """Before anything is served or folded."""
    model("Anna", behaviour=behaviour)
    settings = configured(tmp_path, "model")  # beside the settings file
    with pytest.raises(error):
        async with compose(settings, STACK, None, work=True):
            pass


@pytest.mark.parametrize(("behaviour", "ok"), [("", True), ("die", False)])
async def test_ready_tells_how_the_recogniser_is(tmp_path: Path, model: Model, behaviour: str, ok: bool) -> None:
    """One that is down for now ends no start; where nothing is folded, it is not started."""
    folder = model("Anna", behaviour=behaviour)
    settings = configured(tmp_path, "model")
    async with compose(settings, STACK, None, work=True) as composed:
        found = await readiness(composed.state.checks["names model"], {}, {})
        assert [(one.ok, one.detail == "fake 1 (spaCy 0)", bool(one.hint)) for one in found.findings] == [
            (ok, ok, not ok)
        ]
    before = starts(folder)
    async with compose(settings, STACK, None, work=False) as composed:
        assert "names model" not in composed.state.checks
    assert starts(folder) == before


# What labellers write.


async def test_an_annotation_that_cannot_be_read_is_taken_up_later(
    database: Database, model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not stored, its neighbour is; once it can be read, it is stored redacted."""
    folder = model("Anna")
    item = ReviewItem(
        project=PROJECT, prompt_digest="d", messages=[{"role": "user", "content": "q"}], answer="a", task_id=1
    )
    await store(database, item)
    written = {1: "Ask Anna.", 2: "CRASH Anna."}
    said = tuple(
        SeenAnnotation(number, now(), now(), "ann", as_result(Opinion("wrong", text)))
        for number, text in written.items()
    )
    task = SeenTask(1, item.id, "", now(), None, said)
    settings = settings_for(folder)
    for corrections in ({"Ask <NAME_1>."}, {"Ask <NAME_1>.", "CRASH <NAME_1>."}):
        await pull_module._store(database, [task], 1, settings, PullReport(PROJECT))
        assert {row.correction for row in await rows(database, Annotation)} == corrections
        module.close_all()
        monkeypatch.setattr(module, "CHILD", folder / "child.py")
        module.CHILD.write_text(FAKE.read_text().replace('"CRASH" in said', "False"))
