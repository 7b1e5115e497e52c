"""Annotations back from Label Studio. Polling is the truth: webhooks come once or not at all.

Each look asks for the tasks changed since the watermark, less an overlap. What that can't show (deleted tasks, a server
restored from a backup) the periodic sweep finds. Reading the same thing twice changes nothing.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta

import structlog
from sqlalchemy import update
from sqlalchemy.ext.asyncio import AsyncSession
from sqlmodel import col, select

from labeling.archive import archive
from labeling.crew import Crew, read_crew
from labeling.database import Database, now, one_at_a_time
from labeling.label_studio import LabelStudioServer, SeenAnnotation, SeenTask
from labeling.label_studio_http import LabelStudioNotFound
from labeling.labeling_screen import Opinion, read_result
from labeling.labelling_projects import labelling_project
from labeling.lost_annotations import keep_lost
from labeling.offers import offer_again
from labeling.preferences import meant
from labeling.redacted_items import redacted_opinions
from labeling.screen_upkeep import keep_screen
from labeling.settings import LabelingSettings
from labeling.settling import settle
from labeling.standing import follow_standing
from labeling.sweep import sweep as compare_all
from labeling.tables import Annotation, ItemState, LabellingProject, ReviewItem

log = structlog.get_logger(__name__)
# The server stamps a change before it commits it: one that was slow to commit appears behind the watermark.
OVERLAP = timedelta(seconds=60)
TASKS_PER_TRANSACTION = 50


@dataclass
class PullReport:
    project: str
    tasks: int = 0  # looked at
    annotations: int = 0  # new, edited or deleted ones
    tested: set[str] = field(default_factory=set, repr=False)  # whose answers to gold questions are among them
    labels: Counter[str] = field(default_factory=Counter)  # state -> labels that came into it
    swept: bool = False
    reopened: int = 0  # items whose task had vanished
    replaced: bool = False  # the Label Studio project was gone, and was made again
    archived: int = 0  # tasks of settled labels that left Label Studio
    crew: Crew | None = field(default=None, repr=False)  # read once a pull


async def pull(
    database: Database,
    server: LabelStudioServer,
    project: str,
    settings: LabelingSettings,
    *,
    sweep: bool | None = None,
) -> PullReport:
    """`sweep` compares everything even when it is not due yet, as a night does; False never does, None when due."""
    report = PullReport(project)
    target = first = await labelling_project(database, server, project, settings)
    try:
        await _read_changes(database, server, target, settings, report)
    except LabelStudioNotFound:  # deleted by hand since the last look: made again, and read from its start
        server.forget_project(project)
        target = await labelling_project(database, server, project, settings)
        await _read_changes(database, server, target, settings, report)
    if sweep or (sweep is None and _is_due(target, settings)):
        target = await labelling_project(database, server, project, settings, sure=True)
        await _sweep(database, server, target, settings, report)
    if report.tested or report.swept:
        whose = None if report.swept else report.tested
        report.labels += await follow_standing(database, project, settings, whose)
    await offer_again(database, server, project, target.server_project)
    report.replaced = target.server_project != first.server_project
    if report.annotations or report.reopened or report.archived:
        log.info(
            "pulled",
            project=project,
            annotations=report.annotations,
            labels=dict(report.labels),
            reopened=report.reopened,
            archived=report.archived,
        )
    return report


async def _read_changes(
    database: Database,
    server: LabelStudioServer,
    target: LabellingProject,
    settings: LabelingSettings,
    report: PullReport,
) -> None:
    changes = server.changed_tasks(target.server_project, _since(target))
    newest = await _read(database, changes, target.server_project, settings, report)
    if newest is not None and newest != target.watermark:
        await _remember(database, target, watermark=newest, watermark_moved_at=now())


def _since(target: LabellingProject) -> datetime | None:
    """Once the newest change is old news, whatever was slow to commit has been seen, and nothing is read again.

    Twice the overlap by our clock: at least one look with the overlap came after the last slow commit could. After an
    outage that look may be missing; a sweep is due then.
    """
    if target.watermark is None or target.watermark_moved_at is None:
        return None
    is_news = now() - target.watermark_moved_at < 2 * OVERLAP
    return target.watermark - OVERLAP if is_news else target.watermark


def _is_due(target: LabellingProject, settings: LabelingSettings) -> bool:
    return target.swept_at is None or now() - target.swept_at > timedelta(seconds=settings.sweep_seconds)


async def _sweep(
    database: Database,
    server: LabelStudioServer,
    target: LabellingProject,
    settings: LabelingSettings,
    report: PullReport,
) -> None:
    started = now()
    await keep_screen(database, server, target)
    differences = await compare_all(database, server, target.project, target.server_project)
    changed = server.tasks_by_id(target.server_project, differences.changed_tasks)
    await _read(database, changed, target.server_project, settings, report)
    report.swept, report.reopened = True, differences.reopened
    report.archived = await archive(database, server, target, differences.kept, settings)
    await _remember(database, target, swept_at=started)


async def _remember(database: Database, target: LabellingProject, **values: datetime | None) -> None:
    """Not if the project was replaced meanwhile: its successor is read from the start."""
    kept = {name: value for name, value in values.items() if value is not None}
    if not kept:
        return
    async with database.write() as session:
        same = col(LabellingProject.server_project) == target.server_project
        await session.execute(
            update(LabellingProject).where(col(LabellingProject.project) == target.project, same).values(**kept)
        )


async def _read(
    database: Database,
    tasks: AsyncIterator[SeenTask],
    server_project: int,
    settings: LabelingSettings,
    report: PullReport,
) -> datetime | None:
    """The newest change seen."""
    newest: datetime | None = None
    batch: list[SeenTask] = []
    async for task in tasks:
        newest = max(newest or task.updated_at, task.updated_at)
        batch.append(task)
        if len(batch) == TASKS_PER_TRANSACTION:
            await _store(database, batch, server_project, settings, report)
            batch = []
    await _store(database, batch, server_project, settings, report)
    return newest


async def _store(
    database: Database,
    tasks: Sequence[SeenTask],
    server_project: int,
    settings: LabelingSettings,
    report: PullReport,
) -> None:
    ours = [task for task in tasks if task.item_id is not None]
    report.tasks += len(ours)
    if not ours:
        return
    opinions = await _opinions(database, ours, settings)
    async with database.write() as session:
        await one_at_a_time(session, f"annotations of {server_project}")  # a hint's look may meet a poll's
        touched: set[str] = set()
        crew = report.crew = report.crew or await read_crew(session, report.project, settings.annotators)
        crew.met(annotation.annotator for task in ours for annotation in task.annotations)
        for task in ours:
            touched |= await _store_task(session, task, opinions, server_project, report)
        # By key, so that two pulls at once can't lock each other out on PostgreSQL.
        for item_id in sorted(touched):
            item = await session.get(ReviewItem, item_id, with_for_update=True)
            label = await settle(session, item, settings, crew) if item else None
            if label is not None:
                report.labels[label.state] += 1


async def _opinions(database: Database, tasks: Sequence[SeenTask], settings: LabelingSettings) -> dict[int, Opinion]:
    """By annotation, redacted. Before the transaction and in a thread: a model may be asked, and nobody waits for it.

    One whose names can't be recognised is missing: the next sweep finds that we lack it.
    """
    condition = col(ReviewItem.id).in_({task.item_id for task in tasks})
    async with database.read() as session:
        items = {item.id: item for item in (await session.execute(select(ReviewItem).where(condition))).scalars()}
    said = {
        annotation.id: (items[task.item_id], read_result(annotation.result))
        for task in tasks
        if task.item_id in items
        for annotation in task.annotations
    }
    return await asyncio.to_thread(redacted_opinions, said, settings.redaction)


async def _store_task(
    session: AsyncSession, task: SeenTask, opinions: Mapping[int, Opinion], server_project: int, report: PullReport
) -> set[str]:
    """The items to settle. Nothing is stored of withdrawn items: their data was to go."""
    assert task.item_id is not None
    item = await session.get(ReviewItem, task.item_id)
    if item is None or item.state is ItemState.WITHDRAWN:
        return set()
    if item.task_id is None:
        item.task_id = task.id
    rows = await session.execute(
        select(Annotation).where(
            col(Annotation.labelling_project) == server_project, col(Annotation.item_id) == item.id
        )
    )
    known = {row.annotation_id: row for row in rows.scalars()}
    changed: list[Annotation] = []
    for seen in task.annotations:
        if seen.id not in opinions:
            continue
        states = await _store_annotation(session, item, seen, opinions[seen.id], server_project)
        report.annotations += bool(states)
        changed += states
    if item.task_id == task.id:  # a duplicate task shows only its own annotations
        gone = _mark_deleted(known, task)
        report.annotations += len(gone)
        changed += gone
    # Another item may be a gold question, too.
    if item.gold_id is not None or any(one.item_id != item.id for one in changed):
        report.tested |= {one.annotator for one in changed}
    # The item also where nothing changed: `annotations_per_item` may have.
    return {item.id, *(one.item_id for one in changed)}


def _mark_deleted(known: dict[int, Annotation], task: SeenTask) -> list[Annotation]:
    """Each change of an annotation also dates its task. A task that is older than an annotation of ours has not lost
    it to a person: the server was restored from a backup, and what we hold is all that is left of it.
    """
    seen = {annotation.id for annotation in task.annotations}
    gone = [
        row
        for annotation_id, row in known.items()
        if annotation_id > 0 and annotation_id not in seen and not row.deleted and row.updated_at <= task.updated_at
    ]
    for row in gone:
        row.deleted, row.updated_at = True, now()
    return gone


async def _store_annotation(
    session: AsyncSession, item: ReviewItem, seen: SeenAnnotation, opinion: Opinion, server_project: int
) -> list[Annotation]:
    """As it was and as it is, [] where that is the same. A restored server gives an old one's number to another task:
    what had that number belongs to another item, and maybe to another person.
    """
    row = await session.get(Annotation, (server_project, seen.id))
    new = _annotation(item, seen, meant(item, opinion), server_project)
    if row is None:
        session.add(new)
        return [new]
    was = Annotation(**row.model_dump())
    if row.created_at != new.created_at:
        await keep_lost(session, row)
        session.add(new)
        return [was, new]
    if was.model_dump() == new.model_dump() or (not was.deleted and new.updated_at < was.updated_at):
        return []  # known, or as it was before we last saw it: a restored backup
    for name, value in new.model_dump().items():
        setattr(row, name, value)
    return [was, new]


def _annotation(item: ReviewItem, seen: SeenAnnotation, opinion: Opinion, server_project: int) -> Annotation:
    return Annotation(
        labelling_project=server_project,
        annotation_id=seen.id,
        item_id=item.id,
        annotator=seen.annotator,
        verdict=opinion.verdict,
        correction=opinion.correction,
        must_contain=list(opinion.must_contain),
        cancelled=seen.cancelled,
        lead_seconds=seen.lead_seconds,
        created_at=seen.created_at,
        updated_at=seen.updated_at,
    )
