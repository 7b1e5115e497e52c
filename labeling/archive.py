"""Settled tasks out of Label Studio, so that its project stays small: kept by us as it would import them again.

Only where every annotation is stored here as it stands there, and the label is accepted. A task taken out is like one
that was deleted by hand: its label stays.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime, timedelta
from typing import Any

from sqlalchemy import delete, update
from sqlalchemy.ext.asyncio import AsyncSession
from sqlmodel import col, select

from labeling.database import Database, insert_or_nothing, now
from labeling.label_studio import IDS_PER_QUERY, ITEM_KEY, LabelStudioServer, SeenTask
from labeling.parts import in_parts
from labeling.settings import LabelingSettings
from labeling.tables import Annotation, ArchivedTask, ItemState, Label, LabellingProject, LabelState, ReviewItem

ITEMS_PER_STATEMENT = 500


async def archive(
    database: Database,
    server: LabelStudioServer,
    target: LabellingProject,
    seen: Mapping[str, SeenTask],
    settings: LabelingSettings,
) -> int:
    """How many tasks left. `seen`: item id -> its task, as just listed. Killed between, it is done again."""
    async with database.write() as session:
        await _forget_withdrawn(session, target.project)
    async with database.read() as session:
        due = await _due(session, target.project, seen, settings)
    archived = 0
    for some in in_parts(due, IDS_PER_QUERY):
        tasks = await server.whole_tasks(target.server_project, [seen[item_id].id for item_id in some])
        async with database.write() as session:
            kept = [task for task in tasks if await _keep(session, target, task)]
        await server.delete_tasks(target.server_project, [task["id"] for task in kept])
        archived += len(kept)
    return archived + await _drop_gold(database, server, target, seen, settings)


async def archived_tasks(database: Database, project: str, after: str = "", limit: int = 200) -> list[dict[str, Any]]:
    """As Label Studio imports them, in the order of their items; `after` is the last item's id of the page before."""
    async with database.read() as session:
        rows = await session.execute(
            select(ArchivedTask)
            .where(col(ArchivedTask.project) == project, col(ArchivedTask.item_id) > after)
            .order_by(col(ArchivedTask.item_id))
            .limit(limit)
        )
        return [{**row.task, "item_id": row.item_id, "archived_at": row.archived_at} for row in rows.scalars()]


async def _due(
    session: AsyncSession, project: str, seen: Mapping[str, SeenTask], settings: LabelingSettings
) -> list[str]:
    """Items whose label has been settled for long, and the longest settled beyond `archive_above`."""
    there: list[tuple[datetime, str]] = []
    for part in in_parts(seen, ITEMS_PER_STATEMENT):
        rows = await session.execute(
            select(Label.updated_at, Label.item_id)
            .join(ReviewItem, col(ReviewItem.id) == col(Label.item_id))
            .where(
                col(Label.item_id).in_(part),
                col(Label.project) == project,
                col(Label.state) == LabelState.ACCEPTED,
                col(ReviewItem.state) == ItemState.LABELLED,
            )
        )
        there += [(at, item_id) for at, item_id in rows]
    there.sort(reverse=True)
    limit = now() - timedelta(days=settings.archive_after_days)
    return [item_id for rank, (at, item_id) in enumerate(there) if at < limit or rank >= settings.archive_above]


async def _drop_gold(
    database: Database,
    server: LabelStudioServer,
    target: LabellingProject,
    seen: Mapping[str, SeenTask],
    settings: LabelingSettings,
) -> int:
    """Gold questions answered for long. The answers, which count on, are ours; as tasks nobody needs them."""
    limit = now() - timedelta(days=settings.archive_after_days)
    dropped = 0
    for part in in_parts(seen, ITEMS_PER_STATEMENT):
        answered = select(ReviewItem.id).where(
            col(ReviewItem.id).in_(part),
            col(ReviewItem.project) == target.project,
            col(ReviewItem.gold_id).is_not(None),
            col(ReviewItem.state) == ItemState.LABELLED,
            col(ReviewItem.pushed_at) < limit,
        )
        async with database.read() as session:
            due = list((await session.execute(answered)).scalars())
        if not due:
            continue
        await server.delete_tasks(target.server_project, [seen[item_id].id for item_id in due])
        async with database.write() as session:
            await session.execute(update(ReviewItem).where(col(ReviewItem.id).in_(due)).values(task_id=None))
        dropped += len(due)
    return dropped


async def _keep(session: AsyncSession, target: LabellingProject, task: dict[str, Any]) -> bool:
    """False where something is not stored with us yet, or has changed: the next sweep looks again."""
    item_id = (task.get("meta") or {}).get(ITEM_KEY)
    label = await session.get(Label, item_id)
    rows = await session.execute(
        select(Annotation).where(
            col(Annotation.labelling_project) == target.server_project,
            col(Annotation.item_id) == item_id,
            col(Annotation.annotation_id) > 0,
            col(Annotation.deleted).is_(False),
        )
    )
    held = {row.annotation_id: row.updated_at for row in rows.scalars()}
    there = {row["id"]: datetime.fromisoformat(row["updated_at"]) for row in task["annotations"]}
    if label is None or label.state is not LabelState.ACCEPTED or not there or held != there:
        return False
    row = ArchivedTask(
        labelling_project=target.server_project,
        task_id=task["id"],
        project=target.project,
        item_id=label.item_id,
        task=task,
    )
    await session.execute(delete(ArchivedTask).where(col(ArchivedTask.item_id) == row.item_id))
    await session.execute(insert_or_nothing(session, row))
    await session.execute(update(ReviewItem).where(col(ReviewItem.id) == row.item_id).values(task_id=None))
    return True


async def _forget_withdrawn(session: AsyncSession, project: str) -> None:
    """Their data was to go."""
    withdrawn: Sequence[Any] = (
        (
            await session.execute(
                select(ArchivedTask.item_id)
                .join(ReviewItem, col(ReviewItem.id) == col(ArchivedTask.item_id))
                .where(col(ArchivedTask.project) == project, col(ReviewItem.state) == ItemState.WITHDRAWN)
            )
        )
        .scalars()
        .all()
    )
    await session.execute(delete(ArchivedTask).where(col(ArchivedTask.item_id).in_(withdrawn)))
