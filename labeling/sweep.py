"""The full comparison of Label Studio's tasks with ours, by ids and times: finds what a change list can't show.

Vanished tasks are opened again, duplicates and withdrawn ones deleted, moved scores sent, and the tasks named whose
annotations have to be read again.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from datetime import datetime

from sqlalchemy import update
from sqlalchemy.ext.asyncio import AsyncSession
from sqlmodel import col, select

from labeling.database import Database, now, one_at_a_time
from labeling.label_studio import LabelStudioServer, SeenTask
from labeling.lost_annotations import keep_lost
from labeling.new_tasks import queue_score
from labeling.offers import note_offers
from labeling.push import keeper
from labeling.tables import Annotation, ItemState, Label, LabelState, ReviewItem

ROWS_PER_STATEMENT = 500
MOVES_PER_SWEEP = 200
SCORE_STEP = 0.005  # smaller moves don't change the order enough to be sent


@dataclass(frozen=True)
class _Item:
    id: str
    state: ItemState
    task_id: int | None
    score: float
    label: LabelState | None

    @property
    def needs_task(self) -> bool:
        """A person is still to say or to mend something."""
        return self.state in (ItemState.PUSHED, ItemState.DISPUTED) or (
            self.state is ItemState.LABELLED and self.label is LabelState.REFUSED
        )


@dataclass(frozen=True)
class Differences:
    changed_tasks: frozenset[int]
    reopened: int
    kept: Mapping[str, SeenTask]  # the one task of each item


async def sweep(database: Database, server: LabelStudioServer, project: str, server_project: int) -> Differences:
    # Our rows are read first: an item pushed while the list is read must not look as if its task had vanished.
    items, known, newest = await _ours(database, project, server_project)
    seen: dict[str, list[SeenTask]] = {}
    async for task in server.all_tasks(server_project):
        if task.item_id in items:
            seen.setdefault(task.item_id, []).append(task)
    await server.delete_tasks(server_project, _superfluous(items, seen, newest))
    vanished = [item for item in items.values() if item.needs_task and item.id not in seen]
    reopened = await _reopen(database, vanished, server_project)
    kept = {item_id: keeper(tasks) for item_id, tasks in seen.items()}
    await _follow(database, items, kept)
    await _rescore(server, items, kept)
    await note_offers(database, project, {item_id: task.overlap for item_id, task in kept.items()})
    return Differences(frozenset(_changed(items, seen, known)), reopened, kept)


async def _ours(
    database: Database, project: str, server_project: int
) -> tuple[dict[str, _Item], dict[str, dict[int, datetime]], dict[str, datetime]]:
    """All items by id; the live annotations of each, with the time of their last change; the newest of these times."""
    async with database.read() as session:
        rows = await session.execute(
            select(col(ReviewItem.id), ReviewItem.state, ReviewItem.task_id, ReviewItem.score)
            .add_columns(col(Label.state))
            .join(Label, col(Label.item_id) == col(ReviewItem.id), isouter=True)
            .where(col(ReviewItem.project) == project)
        )
        items = [_Item(*row) for row in rows.all()]
        annotations = await session.execute(
            select(Annotation.item_id, Annotation.annotation_id, Annotation.updated_at).where(
                col(Annotation.labelling_project) == server_project, col(Annotation.deleted).is_(False)
            )
        )
        known: dict[str, dict[int, datetime]] = {}
        newest: dict[str, datetime] = {}
        for item_id, annotation_id, updated_at in annotations.all():
            newest[item_id] = max(newest.get(item_id, updated_at), updated_at)
            if annotation_id > 0:  # the others are lost by the server, kept by us
                known.setdefault(item_id, {})[annotation_id] = updated_at
        return {item.id: item for item in items}, known, newest


def _superfluous(items: dict[str, _Item], seen: dict[str, list[SeenTask]], newest: dict[str, datetime]) -> list[int]:
    """All tasks of withdrawn items; of duplicates those that nobody has annotated; and of labelled items those that a
    backup brought back from before they were annotated: nobody should answer them twice.
    """
    doomed: list[int] = []
    for item_id, tasks in seen.items():
        item = items[item_id]
        if item.state is ItemState.WITHDRAWN:
            doomed += [task.id for task in tasks]
            continue
        kept = keeper(tasks)
        doomed += [task.id for task in tasks if task is not kept and not task.annotations]
        settled = item.state is ItemState.LABELLED and not item.needs_task
        if settled and not kept.annotations and kept.updated_at < newest.get(item_id, kept.updated_at):
            doomed.append(kept.id)
    return doomed


async def _reopen(database: Database, vanished: Collection[_Item], server_project: int) -> int:
    """Their tasks were deleted, or a backup without them was restored. What has an accepted label keeps it.

    A label that waited to be mended goes with its task; opinions that differ stay and count beside the new ones.
    """
    refused = {item.id for item in vanished if item.label is LabelState.REFUSED}
    ids = sorted(item.id for item in vanished)
    unsettled = col(ReviewItem.state).in_((ItemState.PUSHED, ItemState.DISPUTED))
    reopened = 0
    for start in range(0, len(ids), ROWS_PER_STATEMENT):
        some = ids[start : start + ROWS_PER_STATEMENT]
        async with database.write() as session:
            await one_at_a_time(session, f"annotations of {server_project}")
            taken_back = await _take_back(session, [item_id for item_id in some if item_id in refused])
            await _keep_opinions(session, [item_id for item_id in some if item_id not in refused])
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


async def _follow(database: Database, items: dict[str, _Item], kept: dict[str, SeenTask]) -> None:
    """Items whose task has another number now."""
    moved = {
        item_id: task.id
        for item_id, task in sorted(kept.items())
        if items[item_id].task_id not in (None, task.id) and items[item_id].state is not ItemState.WITHDRAWN
    }
    if not moved:
        return
    async with database.write() as session:
        for item_id, task_id in moved.items():
            await session.execute(update(ReviewItem).where(col(ReviewItem.id) == item_id).values(task_id=task_id))


async def _rescore(server: LabelStudioServer, items: dict[str, _Item], kept: dict[str, SeenTask]) -> None:
    """The farthest moves first, as each costs Label Studio two requests; the rest follow with the next sweeps."""
    moves = {
        item_id: abs((2.0 if task.score is None else task.score) - queue_score(items[item_id].score))
        for item_id, task in kept.items()
        if items[item_id].state in (ItemState.PUSHED, ItemState.DISPUTED)
    }
    far = sorted((item_id for item_id, way in moves.items() if way > SCORE_STEP), key=lambda name: -moves[name])
    for item_id in far[:MOVES_PER_SWEEP]:
        await server.rescore(kept[item_id].id, queue_score(items[item_id].score))


def _changed(
    items: dict[str, _Item], seen: dict[str, list[SeenTask]], known: dict[str, dict[int, datetime]]
) -> set[int]:
    """Tasks whose annotations are not the ones we hold, or still wait for a second person."""
    changed: set[int] = set()
    for item_id, tasks in seen.items():
        state = items[item_id].state
        held = known.get(item_id, {})
        there = {annotation.id: annotation.updated_at for task in tasks for annotation in task.annotations}
        older = {number for number, at in there.items() if number in held and at < held[number]}  # a restored backup
        there |= {number: held[number] for number in older}
        waiting = bool(held) and state is ItemState.PUSHED
        if (held != there or waiting) and state is not ItemState.WITHDRAWN:
            changed |= {task.id for task in tasks}
    return changed
