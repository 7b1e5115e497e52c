"""The full comparison of Label Studio's tasks with ours, by ids and times: finds what a change list can't show.

Vanished tasks are opened again, duplicates and withdrawn ones deleted, moved scores sent, and the tasks named whose
annotations have to be read again.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from datetime import datetime

from sqlalchemy import update
from sqlmodel import col, select

from labeling.database import Database
from labeling.label_studio import LabelStudioServer, SeenTask
from labeling.push import keeper, queue_score
from labeling.tables import Annotation, ItemState, ReviewItem

ROWS_PER_STATEMENT = 500
SCORE_STEP = 0.005  # smaller moves don't change the order enough to be sent


@dataclass(frozen=True)
class _Item:
    id: str
    state: ItemState
    task_id: int | None
    score: float


@dataclass(frozen=True)
class Differences:
    changed_tasks: frozenset[int]
    reopened: int


async def sweep(database: Database, server: LabelStudioServer, project: str, server_project: int) -> Differences:
    # Our rows are read first: an item pushed while the list is read must not look as if its task had vanished.
    items, known = await _ours(database, project, server_project)
    seen: dict[str, list[SeenTask]] = {}
    async for task in server.all_tasks(server_project):
        if task.item_id in items:
            seen.setdefault(task.item_id, []).append(task)
    await server.delete_tasks(server_project, _superfluous(items, seen))
    vanished = [item for item in items.values() if item.state is ItemState.PUSHED and item.id not in seen]
    reopened = await _reopen(database, vanished)
    kept = {item_id: keeper(tasks) for item_id, tasks in seen.items()}
    await _follow(database, items, kept)
    await _rescore(server, items, kept)
    return Differences(frozenset(_changed(items, seen, known)), reopened)


async def _ours(
    database: Database, project: str, server_project: int
) -> tuple[dict[str, _Item], dict[str, dict[int, datetime]]]:
    """All items by id; the live annotations of each, with the time of their last change."""
    async with database.read() as session:
        columns = (col(ReviewItem.id), col(ReviewItem.state), col(ReviewItem.task_id), col(ReviewItem.score))
        rows = await session.execute(select(*columns).where(col(ReviewItem.project) == project))
        items = [_Item(*row) for row in rows.all()]
        annotations = await session.execute(
            select(Annotation.item_id, Annotation.annotation_id, Annotation.updated_at).where(
                col(Annotation.labelling_project) == server_project, col(Annotation.deleted).is_(False)
            )
        )
        known: dict[str, dict[int, datetime]] = {}
        for item_id, annotation_id, updated_at in annotations.all():
            known.setdefault(item_id, {})[annotation_id] = updated_at
        return {item.id: item for item in items}, known


def _superfluous(items: dict[str, _Item], seen: dict[str, list[SeenTask]]) -> list[int]:
    """All tasks of withdrawn items; of duplicates those that nobody has annotated."""
    doomed: list[int] = []
    for item_id, tasks in seen.items():
        if items[item_id].state is ItemState.WITHDRAWN:
            doomed += [task.id for task in tasks]
        else:
            kept = keeper(tasks).id
            doomed += [task.id for task in tasks if task.id != kept and not task.annotations]
    return doomed


async def _reopen(database: Database, vanished: Collection[_Item]) -> int:
    """Their tasks were deleted, or a backup without them was restored. What has a label keeps it."""
    ids = sorted(item.id for item in vanished)
    reopened = 0
    for start in range(0, len(ids), ROWS_PER_STATEMENT):
        async with database.write() as session:
            rows = await session.execute(
                update(ReviewItem)
                .where(
                    col(ReviewItem.id).in_(ids[start : start + ROWS_PER_STATEMENT]),
                    col(ReviewItem.state) == ItemState.PUSHED,
                )
                .values(state=ItemState.OPEN, task_id=None, pushed_at=None)
                .returning(col(ReviewItem.id))
            )
            reopened += len(rows.all())
    return reopened


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
    for item_id, task in kept.items():
        item = items[item_id]
        if item.state is ItemState.PUSHED and abs((task.score or 0.0) - queue_score(item.score)) > SCORE_STEP:
            await server.rescore(task.id, queue_score(item.score))


def _changed(
    items: dict[str, _Item], seen: dict[str, list[SeenTask]], known: dict[str, dict[int, datetime]]
) -> set[int]:
    """Tasks whose annotations are not the ones we hold, or still wait for a second person."""
    changed: set[int] = set()
    for item_id, tasks in seen.items():
        state = items[item_id].state
        held = known.get(item_id, {})
        there = {annotation.id: annotation.updated_at for task in tasks for annotation in task.annotations}
        waiting = bool(held) and state is ItemState.PUSHED
        if (held != there or waiting) and state is not ItemState.WITHDRAWN:
            changed |= {task.id for task in tasks}
    return changed
