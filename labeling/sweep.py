"""The full comparison of Label Studio's tasks with ours, by ids and times: finds what a change list can't show.

Vanished tasks are opened again, duplicates and withdrawn ones deleted, moved scores sent, and the tasks named whose
annotations have to be read again.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from sqlalchemy import update
from sqlalchemy.ext.asyncio import AsyncSession
from sqlmodel import col, select

from labeling.database import Database, now, one_at_a_time
from labeling.label_studio import LabelStudioServer, SeenTask
from labeling.lost_annotations import keep_lost
from labeling.new_tasks import queue_score
from labeling.parts import in_parts
from labeling.push import keeper
from labeling.tables import Annotation, ItemState, Label, LabelState, ReviewItem

ITEMS_PER_PART = 500
MOVES_PER_SWEEP = 200
UNSETTLED = (ItemState.PUSHED, ItemState.DISPUTED)
SCORE_STEP = 0.005  # smaller moves don't change the order enough to be sent


@dataclass(frozen=True)
class _Item:
    id: str
    state: ItemState
    task_id: int | None
    pushed_at: datetime | None
    score: float
    people_offered: int
    label: LabelState | None

    @property
    def needs_task(self) -> bool:
        """A person is still to say or to mend something."""
        return self.state in UNSETTLED or (self.state is ItemState.LABELLED and self.label is LabelState.REFUSED)


@dataclass(frozen=True)
class Differences:
    changed_tasks: frozenset[int]
    reopened: int
    kept: Mapping[str, SeenTask]  # the one task of each item


@dataclass(frozen=True)
class _Part:
    """Some of the items that have a task over there, by id, with what is known and what was seen of them."""

    items: Mapping[str, _Item]
    seen: Mapping[str, list[SeenTask]]
    known: Mapping[str, Mapping[int, datetime]]  # live annotations, with the time of their last change
    newest: Mapping[str, datetime]  # of these times, those of annotations that the server has lost included


async def sweep(database: Database, server: LabelStudioServer, project: str, server_project: int) -> Differences:
    """Reads the items that are to have a task, and those that have one: not the queue, and not what is archived."""
    # Read before the list: an item pushed while the list is read must not look as if its task had vanished.
    started, waiting = now(), await _waiting(database, project)
    seen: dict[str, list[SeenTask]] = {}
    async for task in server.all_tasks(server_project):
        if task.item_id is not None:
            seen.setdefault(task.item_id, []).append(task)
    changed: set[int] = set()
    kept: dict[str, SeenTask] = {}
    moves: list[_Move] = []
    for ids in in_parts(seen, ITEMS_PER_PART):
        part = await _part(database, project, server_project, {item_id: seen[item_id] for item_id in ids})
        await _delete_superfluous(server, server_project, part)
        theirs = {item_id: keeper(tasks) for item_id, tasks in part.seen.items()}
        await _follow(database, part, theirs, started)
        moves += _moves(part, theirs)
        changed |= _changed(part)
        kept |= theirs
    reopened = await _reopen(
        database, {one: refused for one, refused in waiting.items() if one not in seen}, server_project
    )
    await _rescore(server, moves)
    return Differences(frozenset(changed), reopened, kept)


async def _waiting(database: Database, project: str) -> dict[str, bool]:
    """The items that need a task -> whether it is their refused label that is to be mended."""
    unsettled = select(ReviewItem.id).where(col(ReviewItem.project) == project, col(ReviewItem.state).in_(UNSETTLED))
    refused = (
        select(Label.item_id)
        .join(ReviewItem, col(ReviewItem.id) == col(Label.item_id))
        .where(col(Label.project) == project, col(Label.state) == LabelState.REFUSED)
        .where(col(ReviewItem.state) == ItemState.LABELLED)
    )
    async with database.read() as session:
        found = dict.fromkeys((await session.execute(unsettled)).scalars(), False)
        return found | dict.fromkeys((await session.execute(refused)).scalars(), True)


async def _part(database: Database, project: str, server_project: int, seen: Mapping[str, list[SeenTask]]) -> _Part:
    """Of tasks that name an item of another project, or one that never was, nothing is kept: they are left alone."""
    columns: tuple[Any, ...] = (
        ReviewItem.id,
        ReviewItem.state,
        ReviewItem.task_id,
        ReviewItem.pushed_at,
        ReviewItem.score,
        ReviewItem.people_offered,
        Label.state,
    )
    rows = (
        select(*columns)
        .join(Label, col(Label.item_id) == col(ReviewItem.id), isouter=True)
        .where(col(ReviewItem.id).in_(seen), col(ReviewItem.project) == project)
    )
    annotations = select(Annotation.item_id, Annotation.annotation_id, Annotation.updated_at).where(
        col(Annotation.item_id).in_(seen),
        col(Annotation.labelling_project) == server_project,
        col(Annotation.deleted).is_(False),
    )
    known: dict[str, dict[int, datetime]] = {}
    newest: dict[str, datetime] = {}
    async with database.read() as session:
        items = {item.id: item for item in (_Item(*row) for row in await session.execute(rows))}
        for item_id, annotation_id, updated_at in await session.execute(annotations):
            newest[item_id] = max(newest.get(item_id, updated_at), updated_at)
            if annotation_id > 0:  # the others are lost by the server, kept by us
                known.setdefault(item_id, {})[annotation_id] = updated_at
    return _Part(items, {item_id: tasks for item_id, tasks in seen.items() if item_id in items}, known, newest)


async def _delete_superfluous(server: LabelStudioServer, server_project: int, part: _Part) -> None:
    """All tasks of withdrawn items; of duplicates those that nobody has annotated; and of labelled items those that a
    backup brought back from before they were annotated: nobody should answer them twice.
    """
    withdrawn: list[int] = []
    doubtful: list[int] = []
    for item_id, tasks in part.seen.items():
        item, kept = part.items[item_id], keeper(tasks)
        if item.state is ItemState.WITHDRAWN:
            withdrawn += [task.id for task in tasks]
            continue
        doubtful += [task.id for task in tasks if task is not kept and not task.annotations]
        settled = item.state is ItemState.LABELLED and not item.needs_task
        if settled and not kept.annotations and kept.updated_at < part.newest.get(item_id, kept.updated_at):
            doubtful.append(kept.id)
    # Somebody may have annotated them since they were listed.
    bare = [task.id async for task in server.tasks_by_id(server_project, doubtful) if not task.annotations]
    await server.delete_tasks(server_project, [*withdrawn, *bare])


async def _reopen(database: Database, vanished: Mapping[str, bool], server_project: int) -> int:
    """Their tasks were deleted, or a backup without them was restored. What has an accepted label keeps it.
    `vanished`: item -> whether it had a refused label.

    A label that waited to be mended goes with its task; opinions that differ stay and count beside the new ones.
    """
    unsettled = col(ReviewItem.state).in_(UNSETTLED)
    reopened = 0
    for some in in_parts(sorted(vanished), ITEMS_PER_PART):
        async with database.write() as session:
            await one_at_a_time(session, f"annotations of {server_project}")
            taken_back = await _take_back(session, [item_id for item_id in some if vanished[item_id]])
            await _keep_opinions(session, [item_id for item_id in some if not vanished[item_id]])
            rows = await session.execute(
                update(ReviewItem)
                .where(col(ReviewItem.id).in_(some), unsettled | col(ReviewItem.id).in_(taken_back))
                .values(state=ItemState.OPEN, task_id=None, pushed_at=None)
                .returning(col(ReviewItem.id))
            )
            reopened += len(rows.all())
    return reopened


async def _take_back(session: AsyncSession, item_ids: list[str]) -> list[str]:
    """The items whose label still is a refused one."""
    ours = col(Label.item_id).in_(item_ids) & (col(Label.state) == LabelState.REFUSED)
    reason = "its task was deleted in Label Studio before it was mended"
    rows = await session.execute(
        update(Label)
        .where(ours)
        .values(state=LabelState.WITHDRAWN, reason=reason, updated_at=now())
        .returning(col(Label.item_id))
    )
    taken_back = list(rows.scalars())
    await session.execute(
        update(Annotation)
        .where(col(Annotation.item_id).in_(taken_back), col(Annotation.deleted).is_(False))
        .values(deleted=True, updated_at=now())
    )
    return taken_back


async def _keep_opinions(session: AsyncSession, item_ids: list[str]) -> None:
    rows = await session.execute(
        select(Annotation)
        .where(
            col(Annotation.item_id).in_(item_ids),
            col(Annotation.annotation_id) > 0,
            col(Annotation.deleted).is_(False),
        )
        .order_by(col(Annotation.labelling_project), col(Annotation.annotation_id))
    )
    for row in rows.scalars().all():
        await keep_lost(session, row)


async def _follow(database: Database, part: _Part, kept: Mapping[str, SeenTask], started: datetime) -> None:
    """Tasks that have another number now, or are offered to another number of people. Not what was pushed since."""
    changed: dict[str, dict[str, int]] = {}
    for item_id, task in kept.items():
        item = part.items[item_id]
        if item.pushed_at is not None and item.pushed_at >= started:
            continue
        values = {"people_offered": task.overlap} if item.people_offered != task.overlap else {}
        if item.task_id not in (None, task.id) and item.state is not ItemState.WITHDRAWN:
            values["task_id"] = task.id
        if values:
            changed[item_id] = values
    if not changed:
        return
    async with database.write() as session:
        for item_id, values in sorted(changed.items()):
            await session.execute(update(ReviewItem).where(col(ReviewItem.id) == item_id).values(**values))


@dataclass(frozen=True)
class _Move:
    task_id: int
    score: float  # as it should be over there
    way: float


def _moves(part: _Part, kept: Mapping[str, SeenTask]) -> list[_Move]:
    moves = []
    for item_id, task in kept.items():
        item = part.items[item_id]
        score = queue_score(item.score)
        way = abs((2.0 if task.score is None else task.score) - score)
        if item.state in UNSETTLED and way > SCORE_STEP:
            moves.append(_Move(task.id, score, way))
    return moves


async def _rescore(server: LabelStudioServer, moves: list[_Move]) -> None:
    """The farthest moves first, as each costs Label Studio two requests; the rest follow with the next sweeps."""
    for move in sorted(moves, key=lambda move: -move.way)[:MOVES_PER_SWEEP]:
        await server.rescore(move.task_id, move.score)


def _changed(part: _Part) -> set[int]:
    """Tasks whose annotations are not the ones we hold, or still wait for a second person."""
    changed: set[int] = set()
    for item_id, tasks in part.seen.items():
        state = part.items[item_id].state
        held = part.known.get(item_id, {})
        there = {annotation.id: annotation.updated_at for task in tasks for annotation in task.annotations}
        older = {number for number, at in there.items() if number in held and at < held[number]}  # a restored backup
        there |= {number: held[number] for number in older}
        waiting = bool(held) and state is ItemState.PUSHED
        if (held != there or waiting) and state is not ItemState.WITHDRAWN:
            changed |= {task.id for task in tasks}
    return changed
