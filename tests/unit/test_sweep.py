"""The periodic comparison with Label Studio: its cost is what is over there, and no strange task stops the sync."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import AsyncIterator
from datetime import timedelta
from typing import Any

import pytest
from sqlalchemy import event, insert
from structlog.testing import capture_logs

from labeling import sweep
from labeling.database import Database, now
from labeling.label_studio import ITEM_KEY, LabelStudioServer
from labeling.parts import in_parts
from labeling.settings import LabelingSettings
from labeling.sync import LabelSync
from labeling.tables import ItemState, Label, LabelState, ReviewItem, Verdict
from tests.fakes.label_studio_server import TOKEN, FakeLabelStudio, fake_label_studio
from tests.integration.labelling.desk import WRONG, Desk
from tests.running import rows


@pytest.fixture
async def fake() -> AsyncIterator[tuple[LabelStudioServer, FakeLabelStudio]]:
    async with fake_label_studio() as (url, fake):
        server = LabelStudioServer(url, TOKEN)
        yield server, fake
        await server.close()


@pytest.fixture
def desk(database: Database, fake: tuple[LabelStudioServer, FakeLabelStudio]) -> Desk:
    return Desk(database, fake[0])


async def history(database: Database, project: str, number: int) -> None:
    """Items that have no task: half of them open, half labelled and archived."""
    ids = [f"it_{secrets.token_hex(8)}" for _ in range(number)]
    plain: dict[str, Any] = {"project": project, "messages": [], "answer": "", "score": 0.1}
    states = (ItemState.OPEN, ItemState.LABELLED)
    items = [
        ReviewItem(id=item_id, prompt_digest=item_id, state=states[place % 2], **plain).model_dump()
        for place, item_id in enumerate(ids)
    ]
    labels = [
        Label(
            item_id=item_id,
            project=project,
            state=LabelState.ACCEPTED,
            verdict=Verdict.GOOD,
            messages=[],
            flagged_answer="",
        ).model_dump()
        for item_id in ids[1::2]
    ]
    async with database.write() as session:
        for table, stored in ((ReviewItem, items), (Label, labels)):
            for part in in_parts(stored, 200):
                await session.execute(insert(table), part)


async def test_only_what_is_over_there_is_read(desk: Desk, database: Database) -> None:
    """Six hundred items without a task cost a sweep no row; three with one are compared as ever."""
    done, waiting, other = await desk.flagged(0.9, 0.8, 0.7)
    await desk.push()
    await desk.annotate(done, WRONG)
    await desk.pull(sweep=True)
    fetched = 0

    def counted(_connection: Any, cursor: Any, *_rest: Any) -> None:
        nonlocal fetched
        fetched += len(getattr(cursor, "_rows", ()))

    async def cost() -> int:
        nonlocal fetched
        fetched = 0
        event.listen(database.engine.sync_engine, "after_cursor_execute", counted)
        await desk.pull(sweep=True)
        event.remove(database.engine.sync_engine, "after_cursor_execute", counted)
        return fetched

    few = await cost()
    await history(database, desk.project, 600)
    assert await cost() == few > 0
    assert {row.state for row in await rows(database, ReviewItem) if row.id in (waiting.id, other.id)} == {
        ItemState.PUSHED
    }


async def test_a_sweep_lets_others_have_their_turn(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    """Our rows are read in parts, and between two of them the event loop goes round."""
    monkeypatch.setattr(sweep, "ITEMS_PER_PART", 4)
    await desk.flagged(*(number / 40 for number in range(10)))
    await desk.push()
    turns, seen, parts = 0, [], []
    real = sweep._part

    async def count_turns() -> None:
        nonlocal turns
        while True:
            turns += 1
            await asyncio.sleep(0)

    async def noted(*given: Any) -> Any:
        seen.append(turns)
        parts.append(len(given[-1]))
        return await real(*given)

    monkeypatch.setattr(sweep, "_part", noted)
    counting = asyncio.create_task(count_turns())
    await desk.pull(sweep=True)
    counting.cancel()
    assert parts == [4, 4, 2]
    assert seen == sorted(set(seen)), "none was read in the turn of another"


STRANGE: dict[str, dict[str, Any]] = {
    "a list for meta": {"meta": [1, 2]},
    "a text for meta": {"meta": "ours"},
    "a number for an item": {"meta": {ITEM_KEY: 7}},
    "a map for an item": {"meta": {ITEM_KEY: {"a": 1}}},
    "a zero byte in an item": {"meta": {ITEM_KEY: "it_\x00"}},
    "an item that never was": {"meta": {ITEM_KEY: "it_never"}},
    "no time": {"updated_at": None},
    "a time of another form": {"updated_at": "yesterday"},
    "data of ours without meta": {"data": {ITEM_KEY: "it_never"}},
}


@pytest.mark.parametrize("form", STRANGE)
async def test_a_strange_task_does_not_stop_the_sync(
    desk: Desk, fake: tuple[LabelStudioServer, FakeLabelStudio], form: str
) -> None:
    """Round and sweep go on, labels come back, and the stranger is still there; one that can't be read is named."""
    server, studio = fake
    (item,) = await desk.flagged(0.5)
    await desk.push()
    stranger = studio.add_task(await desk.server_project(), **STRANGE[form])
    await desk.annotate(item, WRONG)
    settings = LabelingSettings(sweep_seconds=1)
    with capture_logs() as logs:
        for _ in range(2):
            await LabelSync(desk.database, server, desk.project, settings).round()
            await desk.pull(sweep=True)
    assert await desk.ready() == ["14 days."]
    assert stranger in studio.tasks
    assert not [line for line in logs if line["event"] == "labels_not_synced"]
    named = [line["task"] for line in logs if line["event"] == "task_of_unknown_form"]
    assert named == ([stranger] if "time" in form else [])


async def test_what_was_annotated_since_it_was_listed_is_not_deleted(
    desk: Desk, fake: tuple[LabelStudioServer, FakeLabelStudio], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Listed bare, then labelled, and the label read by a hint's look before the sweep looks at our rows."""
    (item,) = await desk.flagged(0.5)
    await desk.push()
    listed = desk.server.all_tasks

    async def slowly(project: int) -> AsyncIterator[Any]:
        async for task in listed(project):
            yield task
        await desk.annotate(item, WRONG)
        await desk.pull(sweep=False)
        assert (await desk.item(item)).state is ItemState.LABELLED

    monkeypatch.setattr(desk.server, "all_tasks", slowly)
    await desk.pull(sweep=True)
    assert len(fake[1].tasks) == len(fake[1].annotations) == 1
    assert await desk.ready() == ["14 days."]


async def test_a_refused_label_without_its_task_is_asked_for_again(
    desk: Desk, fake: tuple[LabelStudioServer, FakeLabelStudio]
) -> None:
    """Beyond the open ones: the item is labelled, but a person was still to mend what they said."""
    refused, open_, fine = await desk.flagged(0.9, 0.8, 0.7)
    await desk.push()
    await desk.change(refused, state=ItemState.LABELLED)
    await desk.change(fine, state=ItemState.LABELLED)
    for item, state in ((refused, LabelState.REFUSED), (fine, LabelState.ACCEPTED)):
        async with desk.database.write() as session:
            session.add(
                Label(
                    item_id=item.id,
                    project=desk.project,
                    state=state,
                    verdict=Verdict.WRONG,
                    messages=[],
                    flagged_answer="",
                    updated_at=now() - timedelta(days=1),
                )
            )
    fake[1].tasks.clear()
    report = await desk.pull(sweep=True)
    assert report.reopened == 2
    assert [(await desk.item(one)).state for one in (refused, open_, fine)] == [
        ItemState.OPEN,
        ItemState.OPEN,
        ItemState.LABELLED,
    ]


def test_parts() -> None:
    """In order, the last one shorter; none of nothing."""
    assert list(in_parts(range(5), 2)) == [[0, 1], [2, 3], [4]]
    assert list(in_parts({}, 2)) == []
