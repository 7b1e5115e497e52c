"""The whole way between Label Studio and our labels, with webhooks, faults, restored backups and the archive."""

from __future__ import annotations

import asyncio
import random
import secrets
import sqlite3
from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, closing
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import update
from sqlmodel import col

from labeling.archive import archived_tasks
from labeling.database import now
from labeling.label_studio import LabelStudioServer, SeenTask
from labeling.label_studio_http import LabelStudioUnavailable
from labeling.labeling_screen import Opinion, as_result, read_result
from labeling.pull import pull
from labeling.push import push
from labeling.sync import LabelSync
from labeling.tables import Annotation, ArchivedTask, ItemState, Label, LabelState, ReviewItem
from service.metrics import Metrics
from service.routes.hooks import hook_routes
from service.servers import HOOK_HOST
from tests.fakes.label_studio import Fault, LabelStudioProxy, WebhookRelay, webhook_relay
from tests.integration.labelling.desk import WRONG, Desk
from tests.running import eventually, rows, service, settings_for

REFUSED = Opinion("wrong", "30 days.")  # the flagged answer unchanged


# the cost of a look


async def test_with_nothing_to_do_a_round_is_one_request(
    desk: Desk, faulty: tuple[LabelStudioServer, LabelStudioProxy]
) -> None:
    """Label Studio works for each of them, day and night."""
    server, proxy = faulty
    await desk.flagged(0.5)
    sync = LabelSync(desk.database, server, desk.project, desk.settings)
    await sync.round()
    await sync.round()
    proxy.requests.clear()
    for _ in range(3):
        await sync.round()
    assert [path for _, path in proxy.requests] == ["/api/tasks"] * 3


# hints


@asynccontextmanager
async def hooked(desk: Desk) -> AsyncIterator[tuple[LabelSync, WebhookRelay]]:
    """A sync that never polls, with its webhook registered and a relay before it."""
    syncs: dict[str, LabelSync] = {}
    routes = hook_routes(desk.server, [desk.project], lambda project: syncs[project].hint(), Metrics())
    async with (
        service(desk.database, settings_for([], [desk.project]), extra_routes=routes) as ours,
        webhook_relay(ours.url, HOOK_HOST) as (url, relay),
    ):
        sync = syncs[desk.project] = LabelSync(desk.database, desk.server, desk.project, desk.settings, url)
        await sync.round()
        running = asyncio.create_task(sync.run())
        yield sync, relay
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)


async def test_a_click_counts_without_waiting_for_a_poll(desk: Desk) -> None:
    """The webhook is registered by us, and wakes the sync: new, edited and deleted annotations."""
    (item,) = await desk.flagged(0.5)
    async with hooked(desk):
        annotation = await desk.annotate(item, WRONG)
        await eventually(lambda: _ready(desk, ["14 days."]), 10)
        await desk.server.edit_annotation(annotation, as_result(Opinion("wrong", "15 days.")))
        await eventually(lambda: _ready(desk, ["15 days."]), 10)
        await desk.server.delete_annotation(annotation)
        await eventually(lambda: _ready(desk, []), 10)


@pytest.mark.parametrize("way", ["lose", "double", "hold"])
async def test_hints_that_are_lost_doubled_or_late_change_no_result(desk: Desk, way: str) -> None:
    """The last word is the API's: after the next poll all is as it stands there."""
    first, second = await desk.flagged(0.5, 0.7)
    async with hooked(desk) as (sync, relay):
        setattr(relay, way, True)
        annotation = await desk.annotate(first, WRONG)
        await desk.annotate(second, WRONG)
        await desk.server.edit_annotation(annotation, as_result(Opinion("wrong", "15 days.")))
        await desk.server.delete_annotation(annotation)
        await desk.annotate(first, Opinion("wrong", "16 days."))
        await eventually(lambda: len(relay.taken) == 5)
        await relay.release()
        if way == "double":
            await eventually(lambda: _ready(desk, ["14 days.", "16 days."]), 10)
        await sync.round()
        await _as_the_api_says(desk)
        assert sorted(map(str, await desk.ready())) == ["14 days.", "16 days."]


async def test_hints_in_a_burst_are_few_looks(desk: Desk, faulty: tuple[LabelStudioServer, LabelStudioProxy]) -> None:
    """However many come: a flood must not become a flood of requests."""
    server, proxy = faulty
    sync = LabelSync(desk.database, server, desk.project, desk.settings)
    await sync.round()
    proxy.requests.clear()
    running = asyncio.create_task(sync.run())
    for _ in range(100):
        sync.hint()
        await asyncio.sleep(0.005)
    await asyncio.sleep(1.5)
    running.cancel()
    await asyncio.gather(running, return_exceptions=True)
    assert 1 <= len(proxy.requests) <= 8


async def _ready(desk: Desk, expected: list[str]) -> bool:
    return sorted(map(str, await desk.ready())) == expected


# deleted by hand


@pytest.mark.parametrize("what", ["project", "tasks"])
async def test_what_waits_for_a_person_is_sent_again(make_desk: Callable[..., Desk], what: str) -> None:
    """Open, refused and disputed items; what is accepted stays as it is. Opinions that were given still count."""
    desk = make_desk(annotations_per_item=2)
    waiting, half, refused, disputed, done = await desk.flagged(0.9, 0.8, 0.7, 0.6, 0.5)
    sync = LabelSync(desk.database, desk.server, desk.project, desk.settings)
    await sync.round()
    second = await _second_labeller(desk)
    await desk.annotate(half, WRONG)
    for item, opinions in (
        (refused, (REFUSED, REFUSED)),
        (disputed, (WRONG, Opinion("wrong", "15 days."))),
        (done, (WRONG, WRONG)),
    ):
        await desk.annotate(item, opinions[0])
        await desk.annotate(item, opinions[1], by=second)
    await sync.round()
    assert [(await desk.item(item)).state for item in (refused, disputed, done)] == [
        ItemState.LABELLED,
        ItemState.DISPUTED,
        ItemState.LABELLED,
    ]
    if what == "project":
        await desk.server.delete_project(await desk.server_project())
    else:
        await desk.server.delete_tasks(await desk.server_project(), [task.id for task in await desk.tasks()])
        await desk.pull(sweep=True)
    await sync.round()
    await sync.round()
    assert {task.item_id for task in await desk.tasks()} == {waiting.id, half.id, refused.id, disputed.id}
    await desk.annotate(half, WRONG, by=second)
    await desk.annotate(refused, WRONG)
    await desk.annotate(refused, WRONG, by=second)
    third = await _second_labeller(desk)
    for opinion in ("15 days.", "15 days."):
        await desk.annotate(disputed, Opinion("wrong", opinion), by=third)
    await desk.pull(sweep=True)
    assert sorted(map(str, await desk.ready())) == ["14 days.", "14 days.", "14 days.", "15 days."]
    for person in (second, third):
        await person.close()


async def _second_labeller(desk: Desk) -> LabelStudioServer:
    email = f"{secrets.token_hex(4)}@example.org"
    return LabelStudioServer(desk.server.url, await desk.server.add_labeller(email, secrets.token_hex(8)))


# restored from a backup


async def test_a_restored_backup_loses_no_label_and_doubles_nothing(desk: Desk, label_studio: Any) -> None:
    """Tasks and annotations made since are gone there, and their numbers go to others."""
    first, second, edited, waiting = await desk.flagged(0.9, 0.8, 0.7, 0.6)
    await desk.push()
    annotation = await desk.annotate(edited, WRONG)
    await desk.pull(sweep=True)
    with _backed_up(label_studio.database):
        lost = await desk.annotate(first, WRONG)
        await desk.server.edit_annotation(annotation, as_result(Opinion("wrong", "Two weeks.")))
        (later,) = await desk.flagged(0.5)
        await desk.push()
        await desk.pull(sweep=True)
        assert await _ready(desk, ["14 days.", "Two weeks."])
    reused = await desk.annotate(second, Opinion("wrong", "15 days."))
    assert reused == lost
    await desk.pull()
    assert await _ready(desk, ["14 days.", "15 days.", "Two weeks."])
    assert (await desk.pull(sweep=True)).reopened == 1
    await desk.push()
    await desk.pull(sweep=True)
    assert await _ready(desk, ["14 days.", "15 days.", "Two weeks."])
    tasks = Counter(task.item_id for task in await desk.tasks())
    assert tasks == {second.id: 1, edited.id: 1, waiting.id: 1, later.id: 1}  # nobody answers the first one twice
    assert (await desk.item(first)).state is ItemState.LABELLED


async def test_after_a_restored_backup_deleting_by_hand_counts_as_ever(desk: Desk, label_studio: Any) -> None:
    """What is lost by the restoration stays, what a person deletes afterwards goes."""
    (item,) = await desk.flagged(0.9)
    await desk.push()
    annotation = await desk.annotate(item, WRONG)
    await desk.pull(sweep=True)
    with _backed_up(label_studio.database):
        pass
    await desk.pull(sweep=True)
    assert await _ready(desk, ["14 days."])
    await desk.server.delete_annotation(annotation)
    await desk.pull(sweep=True)
    assert await _ready(desk, [])


class _backed_up:
    """Label Studio's database at the block's end is again as it was at its begin."""

    def __init__(self, path: Path) -> None:
        self._path, self._copy = path, path.with_name(f"backup-{secrets.token_hex(4)}")

    def __enter__(self) -> None:
        with closing(sqlite3.connect(self._path)) as live, closing(sqlite3.connect(self._copy)) as copy:
            live.backup(copy)

    def __exit__(self, *_: object) -> None:
        with closing(sqlite3.connect(self._path, timeout=10)) as live, closing(sqlite3.connect(self._copy)) as copy:
            copy.backup(live)


# the archive


async def test_settled_tasks_leave_label_studio_and_are_kept(desk: Desk) -> None:
    """Accepted and old: gone there, kept here whole; refused, young and waiting ones stay."""
    old, young, refused, waiting = await desk.flagged(0.9, 0.8, 0.7, 0.6)
    await desk.push()
    await desk.annotate(old, WRONG)
    await desk.annotate(young, WRONG)
    await desk.annotate(refused, REFUSED)
    await desk.pull()
    await _settled_long_ago(desk, old, refused)
    assert (await desk.pull(sweep=True)).archived == 1
    assert {task.item_id for task in await desk.tasks()} == {young.id, refused.id, waiting.id}
    (kept,) = await archived_tasks(desk.database, desk.project)
    assert kept["data"]["flagged_answer"] == "30 days."
    assert read_result(kept["annotations"][0]["result"]) == WRONG
    assert kept["annotations"][0]["completed_by"] == {"email": (await desk.server.check()).user}
    assert (kept["item_id"], await archived_tasks(desk.database, desk.project, after=old.id)) == (old.id, [])
    for _ in range(2):  # neither vanished nor taken back
        assert (await desk.pull(sweep=True)).reopened == 0
        await desk.push()
    label, item = await desk.label(old), await desk.item(old)
    assert label is not None
    assert (label.state, item.state, item.task_id) == (LabelState.ACCEPTED, ItemState.LABELLED, None)
    assert len(await desk.tasks()) == 3


async def test_the_longest_settled_leave_a_large_project_first(make_desk: Callable[..., Desk]) -> None:
    """However young they are."""
    desk = make_desk(archive_above=1)
    first, second = await desk.flagged(0.9, 0.8)
    await desk.push()
    for item in (first, second):
        await desk.annotate(item, WRONG)
        await desk.pull()
    assert (await desk.pull(sweep=True)).archived == 1
    assert [task.item_id for task in await desk.tasks()] == [second.id]


async def test_killed_between_keeping_and_deleting(
    desk: Desk, faulty: tuple[LabelStudioServer, LabelStudioProxy]
) -> None:
    """The next sweep does it again; an edit made meanwhile counts, and stays in Label Studio until it is old."""
    server, proxy = faulty
    item, edited = await desk.flagged(0.9, 0.8)
    await desk.push()
    await desk.annotate(item, WRONG)
    annotation = await desk.annotate(edited, WRONG)
    await desk.pull()
    await _settled_long_ago(desk, item, edited)
    proxy.fail("POST", "/api/dm/actions", status=500, forwarded=False)
    with pytest.raises(LabelStudioUnavailable):
        await pull(desk.database, server, desk.project, desk.settings, sweep=True)
    await desk.server.edit_annotation(annotation, as_result(Opinion("wrong", "Two weeks.")))
    assert (await desk.pull(sweep=True)).archived == 1
    assert [task.item_id for task in await desk.tasks()] == [edited.id]
    assert await _ready(desk, ["14 days.", "Two weeks."])


async def test_an_archive_forgets_what_was_withdrawn(desk: Desk) -> None:
    """Its person asked for that."""
    (item,) = await desk.flagged(0.9)
    await desk.push()
    await desk.annotate(item, WRONG)
    await desk.pull()
    await _settled_long_ago(desk, item)
    await desk.pull(sweep=True)
    assert len(await rows(desk.database, ArchivedTask)) == 1
    await desk.change(item, state=ItemState.WITHDRAWN)
    await desk.pull(sweep=True)
    assert await rows(desk.database, ArchivedTask) == []


async def _settled_long_ago(desk: Desk, *items: ReviewItem) -> None:
    async with desk.database.write() as session:
        ids = [item.id for item in items]
        await session.execute(
            update(Label).where(col(Label.item_id).in_(ids)).values(updated_at=now() - timedelta(days=31))
        )


# everything at once


@pytest.mark.parametrize("seed", [1, 2])
async def test_whatever_breaks_the_api_has_the_last_word(
    desk: Desk, faulty: tuple[LabelStudioServer, LabelStudioProxy], seed: int
) -> None:
    """Label Studio dead, slow, cutting off, answering 500 before and after it committed, while people work and webhooks
    are lost, doubled and late: when it is well again, items, tasks and labels are what its API says.
    """
    server, proxy = faulty
    dice = random.Random(seed)
    sync = LabelSync(desk.database, server, desk.project, desk.settings)
    await sync.round()
    running = asyncio.create_task(sync.run())
    items = await desk.flagged(*(number / 30 for number in range(30)))
    annotated: dict[str, int] = {}
    proxy.chance = lambda _method, _path: _bad_luck(dice)
    for step in range(30):
        await sync.round()
        await _somebody_works(desk, dice, items, annotated)
        for _ in range(dice.choice((0, 1, 3))):  # lost, once, doubled
            sync.hint()
        if step % 10 == 5:
            with_faults = pull(desk.database, server, desk.project, desk.settings, sweep=True)
            await asyncio.gather(with_faults, return_exceptions=True)
    proxy.chance = lambda _method, _path: None
    await sync.round()
    await pull(desk.database, server, desk.project, desk.settings, sweep=True)
    await push(desk.database, server, desk.project, desk.settings)
    running.cancel()
    await asyncio.gather(running, return_exceptions=True)
    assert len(annotated) > 5
    await _as_the_api_says(desk)
    assert set(Counter(task.item_id for task in await desk.tasks()).values()) == {1}


def _bad_luck(dice: random.Random) -> Fault | None:
    """Three requests in ten."""
    if dice.random() > 0.3:
        return None
    kind = dice.randrange(5)
    if kind == 0:
        return Fault(".*", ".*", status=503, forwarded=False)
    if kind == 1:
        return Fault(".*", ".*", status=500, forwarded=False)
    if kind == 2:
        return Fault(".*", ".*", status=500)
    if kind == 3:
        return Fault(".*", ".*", cut=True)
    return Fault(".*", ".*", hook=lambda: asyncio.sleep(2.2 if dice.random() < 0.2 else 0.2))


async def _somebody_works(desk: Desk, dice: random.Random, items: list[ReviewItem], annotated: dict[str, int]) -> None:
    """Directly at the real server."""
    there = {str(task.item_id): task for task in await desk.tasks()}
    if not there:
        return
    item_id = dice.choice(sorted(there))
    opinion = as_result(Opinion("wrong", f"{dice.randrange(100)} days."))
    what = dice.random()
    if item_id not in annotated:
        cancelled = what < 0.2
        annotated[item_id] = await desk.server.annotate(there[item_id].id, opinion, cancelled=cancelled)
    elif what < 0.5:
        await desk.server.edit_annotation(annotated[item_id], opinion)
    elif what < 0.8:
        await desk.server.delete_annotation(annotated.pop(item_id))
    else:
        await desk.server.delete_tasks(await desk.server_project(), [there[item_id].id])
        annotated.pop(item_id)


async def _as_the_api_says(desk: Desk) -> None:
    """Annotations, item states, task numbers and accepted labels, against a reading of everything."""
    tasks: dict[str, SeenTask] = {str(task.item_id): task for task in await desk.tasks()}
    annotations = [row for row in await rows(desk.database, Annotation) if row.annotation_id > 0 and not row.deleted]
    for item in [row for row in await rows(desk.database, ReviewItem) if row.project == desk.project]:
        label, task = await desk.label(item), tasks.get(item.id)
        if task is None:  # deleted by hand once its label was accepted, which it keeps
            assert label is not None
            assert (item.state, label.state) == (ItemState.LABELLED, LabelState.ACCEPTED)
            continue
        assert item.task_id == task.id
        there = {one.id: (one.cancelled, one.updated_at) for one in task.annotations}
        held = {row.annotation_id: (row.cancelled, row.updated_at) for row in annotations if row.item_id == item.id}
        spoken = [one for one in task.annotations if not one.cancelled]
        assert held == there
        if spoken:
            assert label is not None
            said = read_result(max(spoken, key=lambda one: one.updated_at).result).correction
            assert (item.state, label.correction) == (ItemState.LABELLED, said)
        else:
            assert item.state is ItemState.PUSHED
            assert label is None or label.state is LabelState.WITHDRAWN
