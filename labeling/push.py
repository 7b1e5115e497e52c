"""Review items out to Label Studio, the best first, each once: however often, whoever and whenever it is killed.

The item's id in the task is the identity. It is looked up before sending (an earlier try may have committed) and after
(another push may have sent it meanwhile); our own row is written last.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import structlog
from sqlalchemy import func, update
from sqlalchemy.ext.asyncio import AsyncSession
from sqlmodel import col, select

from labeling.database import Database, now
from labeling.gold import slip_in
from labeling.label_studio import LabelStudioServer, NewTask, SeenTask
from labeling.label_studio_http import LabelStudioRefused
from labeling.labelling_projects import labelling_project
from labeling.new_tasks import as_tasks
from labeling.offers import offer_again
from labeling.overlap import people_needed
from labeling.redacted_items import bring_up_to_date
from labeling.settings import LabelingSettings
from labeling.tables import ItemState, ReviewItem

log = structlog.get_logger(__name__)
TASKS_PER_IMPORT = 50


@dataclass
class PushReport:
    sent: int = 0
    found_again: int = 0  # tasks that an earlier, interrupted push had sent
    removed: int = 0  # tasks of withdrawn items, duplicates and outdated ones
    refused: dict[str, str] = field(default_factory=dict)  # item id -> Label Studio's reason


async def push(database: Database, server: LabelStudioServer, project: str, settings: LabelingSettings) -> PushReport:
    """With nothing to send or to remove, Label Studio is not asked."""
    report = PushReport()
    async with database.read() as session:
        withdrawn = await _withdrawn(session, project)
        items = await _next_items(session, project, settings.max_open_tasks)
    if not withdrawn and not items:
        return report
    items = await _with_gold(database, project, items, settings)
    target = (await labelling_project(database, server, project, settings, sure=True)).server_project
    report.removed += await _remove_withdrawn(database, server, target, withdrawn)
    plain = [item for item in items if item.gold_id is None]
    fit = {item.id for item in await bring_up_to_date(database, plain, settings.redaction)}
    items = [item for item in items if item.gold_id is not None or item.id in fit]
    for start in range(0, len(items), TASKS_PER_IMPORT):
        await _push_some(database, server, target, items[start : start + TASKS_PER_IMPORT], settings, report)
    await offer_again(database, server, project, target)
    if report.sent or report.removed or report.refused:
        log.info("pushed", project=project, sent=report.sent, removed=report.removed, refused=report.refused)
    return report


async def _next_items(session: AsyncSession, project: str, max_open_tasks: int) -> list[ReviewItem]:
    ours = col(ReviewItem.project) == project
    waiting = select(func.count()).where(ours, col(ReviewItem.state) == ItemState.PUSHED)
    room = max_open_tasks - (await session.execute(waiting)).scalar_one()
    best = (
        select(ReviewItem)
        .where(ours, col(ReviewItem.state) == ItemState.OPEN)
        .order_by(col(ReviewItem.score).desc(), col(ReviewItem.created_at), col(ReviewItem.id))
        .limit(max(room, 0))
    )
    return list((await session.execute(best)).scalars())


async def _with_gold(
    database: Database, project: str, items: list[ReviewItem], settings: LabelingSettings
) -> list[ReviewItem]:
    """Among the others, so that neither place nor number tells them apart."""
    if not items or not settings.gold.share:
        return items
    async with database.write() as session:
        gold = await slip_in(session, project, items, settings.gold)
    return sorted([*items, *gold], key=lambda item: (-item.score, item.id)) if gold else items


async def _withdrawn(session: AsyncSession, project: str) -> list[str]:
    """Items whose tasks may still be there."""
    condition = (col(ReviewItem.project) == project) & (col(ReviewItem.state) == ItemState.WITHDRAWN)
    rows = await session.execute(select(ReviewItem.id).where(condition, col(ReviewItem.task_id).is_not(None)))
    return list(rows.scalars())


async def _remove_withdrawn(database: Database, server: LabelStudioServer, target: int, item_ids: list[str]) -> int:
    found = await server.find_tasks(target, item_ids)
    tasks = {task.id for seen in found.values() for task in seen}
    await server.delete_tasks(target, tasks)
    async with database.write() as session:
        withdrawn = col(ReviewItem.id).in_(item_ids)
        await session.execute(update(ReviewItem).where(withdrawn).values(task_id=None))
    return len(tasks)


async def _push_some(
    database: Database,
    server: LabelStudioServer,
    target: int,
    items: Sequence[ReviewItem],
    settings: LabelingSettings,
    report: PushReport,
) -> None:
    tasks = await as_tasks(database, items)
    there, outdated = _sorted_out(await server.find_tasks(target, tasks), tasks)
    await server.delete_tasks(target, outdated)
    missing = [task for item_id, task in tasks.items() if item_id not in there]
    await _import(server, target, missing, report)
    now_there, spare = _sorted_out(await server.find_tasks(target, tasks), tasks)
    await server.delete_tasks(target, spare)
    report.sent += len(now_there.keys() - there.keys())
    report.found_again += len(there)
    changed_meanwhile = await _mark_pushed(database, items, now_there, settings)
    await server.delete_tasks(target, changed_meanwhile)
    report.removed += len(outdated) + len(spare) + len(changed_meanwhile)


def _sorted_out(found: dict[str, list[SeenTask]], tasks: dict[str, NewTask]) -> tuple[dict[str, SeenTask], list[int]]:
    """The one task to keep of each item, and those to delete. What a person has annotated is never deleted."""
    kept: dict[str, SeenTask] = {}
    for item_id, seen in found.items():
        right = [task for task in seen if task.annotations or task.shown == tasks[item_id].shown]
        if right:
            kept[item_id] = keeper(right)
    keep = {task.id for task in kept.values()}
    return kept, [task.id for seen in found.values() for task in seen if task.id not in keep and not task.annotations]


def keeper(duplicates: Iterable[SeenTask]) -> SeenTask:
    """Every process chooses the same: an annotated one, then the oldest."""
    return min(duplicates, key=lambda task: (not task.annotations, task.id))


async def _import(server: LabelStudioServer, target: int, tasks: Sequence[NewTask], report: PushReport) -> None:
    """One bad task must not hold up the others: a refused batch is sent again one by one."""
    if not tasks:
        return
    try:
        await server.import_tasks(target, tasks)
    except LabelStudioRefused as error:
        if len(tasks) == 1:
            report.refused[tasks[0].item_id] = str(error)
            return
        for task in tasks:
            await _import(server, target, [task], report)


async def _mark_pushed(
    database: Database, items: Sequence[ReviewItem], there: dict[str, SeenTask], settings: LabelingSettings
) -> list[int]:
    """The tasks whose item changed or was withdrawn while they were sent: they show something else now."""
    stale = []
    async with database.write() as session:
        for item in items:
            if item.id not in there:
                continue
            task = there[item.id]
            unchanged = (
                (col(ReviewItem.answer) == item.answer)
                & col(ReviewItem.prefilled).is_not_distinct_from(item.prefilled)
                & col(ReviewItem.other_answer).is_not_distinct_from(item.other_answer)
            )
            people = {"people_wanted": await people_needed(session, item, settings), "people_offered": task.overlap}
            result = await session.execute(
                update(ReviewItem)
                .where(col(ReviewItem.id) == item.id, col(ReviewItem.state) == ItemState.OPEN, unchanged)
                .values(state=ItemState.PUSHED, task_id=task.id, pushed_at=now(), **people)
                .returning(col(ReviewItem.id))
            )
            taken = result.scalar_one_or_none() is not None or await _is_pushed_as(session, item.id, task.id)
            if not taken and not task.annotations:
                stale.append(task.id)
    return stale


async def _is_pushed_as(session: AsyncSession, item_id: str, task_id: int) -> bool:
    """Another push, at the same time, was first with the same task."""
    row = await session.execute(select(ReviewItem.task_id).where(col(ReviewItem.id) == item_id))
    return row.scalar_one_or_none() == task_id
