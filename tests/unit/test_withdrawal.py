"""An item taken out of the queue: its task goes, it stays out, and who did it when and why is kept."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import httpx
import pytest

from labeling.database import Database, now
from labeling.feedback import fold
from labeling.label_studio import LabelStudioServer
from labeling.settings import LabelingSettings
from labeling.tables import (
    Annotation,
    Feedback,
    FeedbackKind,
    GoldQuestion,
    ItemMember,
    ItemState,
    ItemWithdrawal,
    Label,
    LabelState,
    ReviewItem,
    Verdict,
)
from labeling.withdrawal import ItemIsGold, ItemIsLabelled, UnknownItem, withdraw
from loop.watch.live import Live
from service.app import assemble, create_app
from service.commands import queue
from service.commands.local_api import Answered
from service.routes.nights import NightDesk
from service.routes.queue import queue_routes
from tests.fakes.label_studio_server import TOKEN, fake_label_studio
from tests.integration.labelling.desk import WRONG, Desk
from tests.running import NOWHERE, PROJECT, Service, offline_clients, rows, serving, settings_for
from tests.unit.test_feedback import exchange, feedback, store
from tests.unit.test_gold_commands import settings  # noqa: F401  # a fixture

SETTINGS = LabelingSettings(held_out_share=0)


async def flagged(database: Database, text: str = "Who founded it?", **columns: Any) -> ReviewItem:
    """The newest item, after a flag on an answer to `text`."""
    known = exchange(text, **columns)
    await store(database, known, feedback(known))
    await fold(database, PROJECT, SETTINGS)
    items: list[ReviewItem] = await rows(database, ReviewItem)
    return max(items, key=lambda item: item.id)


async def labelled(database: Database, item: ReviewItem, state: LabelState) -> None:
    label = Label(item_id=item.id, project=PROJECT, state=state, verdict=Verdict.WRONG, messages=[], flagged_answer="x")
    label.annotators = ["ann@example.org"]
    async with database.write() as session:
        session.add(label)


async def test_who_when_and_why_is_kept_once(database: Database) -> None:
    """Again, by somebody else and for another reason, it changes nothing and answers the same."""
    item = await flagged(database)
    first = await withdraw(database, PROJECT, item.id, "ann", "spam " * 200)
    assert (first["id"], first["state"], first["by"]) == (item.id, ItemState.WITHDRAWN, "ann")
    assert len(first["reason"]) == 500
    assert now() - first["at"] < timedelta(minutes=1)
    again = await withdraw(database, PROJECT, item.id, "bob", "other")
    assert again["by"] == "ann"
    assert [row.by for row in await rows(database, ItemWithdrawal)] == ["ann"]
    assert [row.state for row in await rows(database, ReviewItem)] == [ItemState.WITHDRAWN]


async def test_what_can_not_be_withdrawn(database: Database) -> None:
    """Each with the cure, and nothing changed: unknown, another project's, accepted, gold."""
    item = await flagged(database)
    for project, item_id in (("other", item.id), (PROJECT, "it_none")):
        with pytest.raises(UnknownItem, match=item_id) as unknown:
            await withdraw(database, project, item_id, "ann")
        assert "queue next" in unknown.value.hint
    await labelled(database, item, LabelState.ACCEPTED)
    with pytest.raises(ItemIsLabelled, match="labelled already, by ann") as accepted:
        await withdraw(database, PROJECT, item.id, "ann")
    assert "annotations" in accepted.value.hint
    async with database.write() as session:
        session.add(gold := ReviewItem(project=PROJECT, prompt_digest="g", messages=[], answer="x"))
    async with database.write() as session:
        row = await session.get_one(ReviewItem, gold.id)
        session.add(question := _gold())
        await session.flush()
        row.gold_id = question.id
    with pytest.raises(ItemIsGold) as is_gold:
        await withdraw(database, PROJECT, gold.id, "ann")
    assert "gold retire gq_1" in is_gold.value.hint
    assert await rows(database, ItemWithdrawal) == []


def _gold() -> GoldQuestion:
    return GoldQuestion(id="gq_1", project=PROJECT, messages=[], answer="x", verdict=Verdict.GOOD)


@pytest.mark.parametrize("state", [LabelState.DISPUTED, LabelState.REFUSED])
async def test_an_unsettled_label_goes_with_it(database: Database, state: LabelState) -> None:
    item = await flagged(database)
    await labelled(database, item, state)
    await withdraw(database, PROJECT, item.id, "ann")
    (label,) = await rows(database, Label)
    assert (label.state, label.reason) == (LabelState.WITHDRAWN, "its item was withdrawn")


async def test_new_feedback_on_it_stays_out(database: Database) -> None:
    """By the same adapter, by one that is not known, and comments: stored, counted as left out, no member, no item."""
    item = await flagged(database, served="base")
    await withdraw(database, PROJECT, item.id, "ann")
    assert (await flagged(database, served="base")).id == item.id
    talk = exchange(served="base")
    await store(database, feedback(messages=item.messages, answer="So."), talk)
    await store(database, feedback(talk, kind=FeedbackKind.COMMENT, comment="still"))
    await fold(database, PROJECT, SETTINGS)
    assert len(await rows(database, ReviewItem)) == len(await rows(database, ItemMember)) == 1
    stored = sorted(str(row.entry) for row in await rows(database, Feedback))
    assert stored == ["comment", "entered: flags", "left out: withdrawn", "left out: withdrawn"]
    assert all(row.folded_at for row in await rows(database, Feedback))


async def test_another_adapters_later_answer_opens_a_new_item(database: Database) -> None:
    """Of a problem that comes with a new adapter nobody has decided yet. Its older answers say nothing new."""
    item = await flagged(database, served="base")
    older = now()
    await withdraw(database, PROJECT, item.id, "ann")
    assert (await flagged(database, served="app@v2", created_at=older)).id == item.id
    new = await flagged(database, served="app@v2")
    assert (new.id != item.id, new.state, new.round) == (True, ItemState.OPEN, 2)


@pytest.fixture
async def desk(database: Database) -> AsyncIterator[Desk]:
    async with fake_label_studio() as (url, _):
        server = LabelStudioServer(url, TOKEN)
        yield Desk(database, server)
        await server.close()


async def test_its_task_leaves_label_studio(desk: Desk) -> None:
    """With the next push, and with its annotations; what was annotated meanwhile makes no label."""
    gone, stays = await desk.flagged(0.9, 0.8)
    await desk.push()
    await withdraw(desk.database, desk.project, gone.id, "ann")
    await desk.annotate(gone, WRONG)
    await desk.pull(sweep=False)
    assert (await desk.push()).removed == 1
    assert [task.item_id for task in await desk.tasks()] == [stays.id]
    await desk.pull(sweep=True)
    assert await desk.label(gone) is None
    assert await rows(desk.database, Annotation) == []
    assert (await desk.item(gone)).state is ItemState.WITHDRAWN


async def test_withdrawn_while_it_is_sent(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between the choice of the next tasks and the note that they were sent: no task stays."""
    (item,) = await desk.flagged(0.9)
    send = desk.server.import_tasks

    async def late(*given: object) -> None:
        await send(*given)  # type: ignore[arg-type]
        await withdraw(desk.database, desk.project, item.id, "ann")

    monkeypatch.setattr(desk.server, "import_tasks", late)
    await desk.push()
    assert await desk.tasks() == []
    assert (await desk.item(item)).state is ItemState.WITHDRAWN


async def test_over_http(database: Database, tmp_path: Path) -> None:
    """200 twice; 404 and 409 as problems with the cure; only with a key of scope admin."""
    item, other = await flagged(database), await flagged(database, "And who else?")
    await labelled(database, other, LabelState.ACCEPTED)
    where = f"/v1/projects/{PROJECT}/queue/items"
    known = settings_for([NOWHERE], data_dir=tmp_path)
    state, clients = assemble(known, database), offline_clients(database, tmp_path)
    desk = NightDesk(clients, {p.name: p for p in known.projects}, tmp_path, state.keys, Live(), lambda: None)
    async with serving(create_app(known, state, extra_routes=queue_routes(desk))) as url:
        running = Service(url, known, state)
        client: httpx.AsyncClient
        async with await running.client("read", "feedback") as client:
            assert (await client.delete(f"{where}/{item.id}")).status_code == 403
        async with await running.client("admin") as client:
            answers = [await client.delete(f"{where}/{item.id}", params={"reason": "spam"}) for _ in range(2)]
            unknown, accepted = await client.delete(f"{where}/it_none"), await client.delete(f"{where}/{other.id}")
    assert [answer.status_code for answer in answers] == [200, 200]
    assert answers[0].json() == answers[1].json()
    assert (answers[0].json()["state"], answers[0].json()["reason"]) == ("withdrawn", "spam")
    for answer, status, code in ((unknown, 404, "unknown_item"), (accepted, 409, "item_is_labelled")):
        assert (answer.status_code, answer.json()["code"]) == (status, code)
        assert answer.json()["hint"]
    await clients.label_studio.close()


def test_on_the_command_line(settings: Path, capsys: pytest.CaptureFixture[str]) -> None:  # noqa: F811
    """An unknown item ends it in one line with the cure; the ids are those that `queue next` shows."""
    with pytest.raises(Answered) as caught:
        queue.withdraw(settings, ["it_none"], reason="", project=None)
    assert caught.value.hint == UnknownItem.default_hint
    queue.show_next(settings, project=None, limit=5, as_json=True)
    assert json.loads(capsys.readouterr().out) == []
