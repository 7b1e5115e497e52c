"""The queue's report: what waits, what is held back, and whether choosing beats drawing, said with its doubt."""

from __future__ import annotations

import asyncio
import json
from datetime import date, timedelta
from pathlib import Path
from typing import Any

import pytest

from labeling.database import Database, now
from labeling.feedback import fold
from labeling.proportions import Proportion, difference
from labeling.queue_report import comparison, queue_report
from labeling.settings import LabelingSettings
from labeling.tables import Chosen, Feedback, FeedbackKind, ItemState, Label, LabelState, ReviewItem, Verdict
from loop.label_fixes import label_fixes
from loop.tables import LabelUse, Night, NightState, Promotion, StageMarker
from loop.watch.live import Live
from service.app import assemble, create_app
from service.commands import queue as commands
from service.migrations import upgrade
from service.routes.nights import NightDesk
from service.routes.pages import page_routes
from service.routes.queue import queue_routes
from service.settings import load
from tests.running import NOWHERE, PROJECT, Service, offline_clients, serving, settings_for


def item(number: int, chosen: Chosen, state: ItemState = ItemState.LABELLED, **columns: Any) -> ReviewItem:
    messages = [{"role": "user", "content": f"Question {number}?"}]
    known = {"id": f"it_{number}", "project": PROJECT, "prompt_digest": str(number), "answer": "So."}
    return ReviewItem(**{**known, "messages": messages, "chosen": chosen, "state": state, **columns})


def label(of: ReviewItem, verdict: Verdict, correction: str | None, state: LabelState = LabelState.ACCEPTED) -> Label:
    known: dict[str, Any] = {"item_id": of.id, "id": f"lb_{of.id}", "project": PROJECT, "messages": of.messages}
    known["flagged_answer"] = ""
    return Label(**known, verdict=verdict, correction=correction, state=state)


async def store(database: Database, *groups: list[Any]) -> None:
    for group in groups:
        async with database.write() as session:
            session.add_all(group)


@pytest.mark.parametrize(("hits", "n"), [(0, 10), (10, 10), (3, 10), (50, 200)])
def test_intervals_hold_the_share(hits: int, n: int) -> None:
    """Wilson's, against the textbook's formula at 50 of 200; never outside 0..1."""
    low, high = Proportion(hits, n).interval
    assert 0 <= low <= hits / n <= high <= 1
    if (hits, n) == (50, 200):
        assert [low, high] == pytest.approx([0.1950, 0.3144], abs=5e-4)


def test_difference_is_newcombes() -> None:
    """His own example (1998, method 10): 56/70 against 48/80."""
    found = difference(Proportion(56, 70), Proportion(48, 80))
    assert found is not None
    assert list(found) == pytest.approx([0.2, 0.0524, 0.3339], abs=5e-4)
    assert difference(Proportion(0, 0), Proportion(1, 2)) is None


@pytest.mark.parametrize(
    ("chosen", "drawn", "said"),
    [
        ((90, 100), (40, 100), "chosen by score is better"),
        ((40, 100), (90, 100), "chosen at random is better: look"),
        ((50, 100), (48, 100), "no difference shown"),
        ((9, 9), (1, 9), "hint only"),
        ((9, 9), (0, 0), "nothing to compare yet: 9 by score, 0 at random"),
    ],
)
def test_verdict_says_what_may_be_said(chosen: tuple[int, int], drawn: tuple[int, int], said: str) -> None:
    """Also when random wins, and when too few were counted."""
    found = comparison({Chosen.SCORE: Proportion(*chosen), Chosen.RANDOM: Proportion(*drawn)})
    assert said in found["verdict"]


async def test_report_counts_what_waits_and_what_labels_said(database: Database) -> None:
    """A correction counts; a good verdict, a refused label do not; a withdrawn label is no label."""
    waiting = [
        item(1, Chosen.SCORE, ItemState.OPEN, created_at=now() - timedelta(hours=3)),
        item(2, Chosen.RANDOM, ItemState.PUSHED),
    ]
    scored = [item(number, Chosen.SCORE) for number in range(10, 14)]
    drawn = [item(number, Chosen.RANDOM) for number in range(20, 22)]
    labels = [
        label(scored[0], Verdict.WRONG, "Right"),
        label(scored[1], Verdict.GOOD, None),
        label(scored[2], Verdict.WRONG, None, LabelState.REFUSED),
        label(scored[3], Verdict.WRONG, "Right", LabelState.WITHDRAWN),
        label(drawn[0], Verdict.UNSAFE, "Safe"),
        label(drawn[1], Verdict.CANNOT_TELL, None),
    ]
    await store(database, waiting + scored + drawn, labels)
    report = await queue_report(database, PROJECT)
    assert (report["length"], report["oldest"]["id"]) == (2, "it_1")
    assert report["oldest"]["hours"] == pytest.approx(3, abs=0.1)
    assert report["states"] == {"open": 1, "pushed": 1, "labelled": 6}
    assert report["chosen"]["random"] == {"pushed": 1, "labelled": 2}
    found = {name: (report["corrections"][name]["hits"], report["corrections"][name]["n"]) for name in Chosen}
    assert found == {"score": (1, 3), "random": (1, 2)}


async def test_report_shows_what_caps_hold_back(database: Database) -> None:
    settings = LabelingSettings.model_validate({"entry": {"reporter_per_day": 1, "low_ratings": 0}})
    asked: dict[str, Any] = {"project": PROJECT, "answer": "So.", "reporter": "me"}
    flags = [
        Feedback(kind=FeedbackKind.FLAG, messages=[{"role": "user", "content": str(number)}], **asked)
        for number in range(3)
    ]
    low = Feedback(kind=FeedbackKind.RATING, value=0, messages=[{"role": "user", "content": "low"}], **asked)
    await store(database, [*flags, low])
    await fold(database, PROJECT, settings)
    entry = (await queue_report(database, PROJECT))["entry"]
    assert entry["counts"] == {"entered": {"flags": 1}, "left out": {"low_ratings": 1}}
    assert entry["held_back"]["reporter"]["waiting"] == 2


async def test_fixes_are_those_of_the_first_promoted_night(database: Database, tmp_path: Path) -> None:
    """A label counts once, by the exam's own rows; nights that were not promoted, and lost files, do not count."""
    items = [item(1, Chosen.SCORE), item(2, Chosen.SCORE), item(3, Chosen.RANDOM), item(4, Chosen.RANDOM)]
    nights = [Night(id=f"ni_{n}", project=PROJECT, date=date(2026, 1, n), due_at=now()) for n in (1, 2, 3, 4)]
    nights[0].state = NightState.REJECTED
    uses = [
        LabelUse(night_id=night.id, label_id=f"lb_{one.id}", item_id=one.id, role="new")
        for night in nights
        for one in items
    ]
    promoted = [
        Promotion(project=PROJECT, from_adapter="a", to_adapter="b", by="me", why="", night_id=night.id)
        for night in nights[1:]
    ]
    for number, one in enumerate(promoted):
        one.at = now() + timedelta(days=number)
    markers = [
        StageMarker(night_id=night.id, stage="evaluate", token=1, folder=f"nights/{night.id}", digest="", seconds=1)
        for night in nights
    ]
    await store(database, items, nights, uses, promoted, markers)
    exam(tmp_path, "ni_1", {"lb_it_1": 0.0, "lb_it_3": 0.0})  # rejected
    exam(tmp_path, "ni_2", {"lb_it_1": 1.0, "lb_it_2": 0.0, "lb_it_3": 1.0, "lb_other": 0.0})
    exam(tmp_path, "ni_3", {"lb_it_1": 0.0, "lb_it_2": 1.0, "lb_it_4": None})
    found = await label_fixes(database, tmp_path, PROJECT)
    assert {name: (found[name]["hits"], found[name]["n"]) for name in Chosen} == {"score": (1, 2), "random": (1, 2)}
    assert (found["nights"], found["unread"]) == (3, 1)


def exam(data_dir: Path, night: str, candidate: dict[str, float | None]) -> None:
    folder = data_dir / "nights" / night
    folder.mkdir(parents=True)
    for name, part in (("trained", list(candidate.items())[::2]), ("held_out", list(candidate.items())[1::2])):
        rows = [json.dumps({"id": key, "current": 0.0, "candidate": value}) for key, value in part]
        (folder / f"family-{name}.jsonl").write_text("\n".join(rows) + "\n", encoding="utf-8")


async def test_routes_and_page(database: Database, tmp_path: Path) -> None:
    """The report and the head of the queue over HTTP, with the factors; the page shows the queue's length."""
    settings = settings_for([NOWHERE], data_dir=tmp_path)
    state = assemble(settings, database)
    asked = [{"role": "user", "content": "Why <b>?"}]
    await store(
        database, [Feedback(project=PROJECT, kind=FeedbackKind.FLAG, messages=asked, answer="So.", severity=0.9)]
    )
    await fold(database, PROJECT, LabelingSettings())
    clients = offline_clients(database, tmp_path)
    desk = NightDesk(clients, {p.name: p for p in settings.projects}, tmp_path, state.keys, Live(), lambda: None)
    routes = [*queue_routes(desk), *page_routes(desk)]
    async with serving(create_app(settings, state, extra_routes=routes)) as url:
        running = Service(url, settings, state)
        async with await running.client("read") as http:
            report = (await http.get(f"/v1/projects/{PROJECT}/queue/report")).json()
            head = (await http.get(f"/v1/projects/{PROJECT}/queue/next?limit=5")).json()
            page = (await http.get("/")).text
            assert (await http.get("/v1/projects/another/queue/report")).status_code == 403
        async with await running.client("inference") as other:
            assert (await other.get(f"/v1/projects/{PROJECT}/queue/next")).status_code == 403
    assert (report["length"], report["fixes"]["nights"]) == (1, 0)
    assert [(one["prompt"], one["severity"], one["uncertainty"]) for one in head] == [("Why <b>?", 0.9, None)]
    assert set(head[0]["factors"]) == {"severity", "uncertainty", "novelty", "traffic"}
    assert "1 wait, the oldest for" in page
    await clients.label_studio.close()


SETTINGS = """
[vllm]
managed = false
replicas = [{ url = "http://127.0.0.1:9" }]
[label_studio]
managed = false
[mlflow]
managed = false
url = "http://127.0.0.1:9"
[[projects]]
name = "support-bot"
base_dir = "base"
base_name = "base"
"""


def test_commands_tell_people(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """`queue report` and `queue next` without a running process: what waits, who is held back, why in that order."""
    path = tmp_path / "nightschool.toml"
    path.write_text(SETTINGS, encoding="utf-8")
    url = load(path).model_copy(update={"data_dir": tmp_path / "nightschool-data"}).database_url
    (tmp_path / "nightschool-data").mkdir()
    upgrade(url)
    asyncio.run(_flagged(url))
    path.write_text(f'data_dir = "{tmp_path}/nightschool-data"\n{SETTINGS}', encoding="utf-8")
    commands.report(path, project=None, as_json=False)
    told = capsys.readouterr().out
    assert "2 items wait" in told
    assert "held back by the cap per reporter: 1, which enter from" in told
    assert "nothing to compare yet" in told
    commands.show_next(path, project=None, limit=5, as_json=False)
    told = capsys.readouterr().out
    assert told.index("Severe [one]?") < told.index("Mild?"), "in the queue's order"
    assert "uncertainty 0.55?" in told
    assert "novelty 1.00 " in told


async def _flagged(url: str) -> None:
    database = Database(url)
    asked = {"Mild?": 0.1, "Severe [one]?": 1.0, "Too much?": 1.0}
    flags = [
        Feedback(
            project=PROJECT,
            kind=FeedbackKind.FLAG,
            messages=[{"role": "user", "content": text}],
            answer="So.",
            severity=severity,
            reporter="me",
        )
        for text, severity in asked.items()
    ]
    await store(database, flags)
    rules = {"entry": {"reporter_per_day": 2}, "selection": {"random_share": 0}}
    await fold(database, PROJECT, LabelingSettings.model_validate(rules))
    await database.close()
