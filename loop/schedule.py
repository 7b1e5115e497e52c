"""When a night is due, and the row that claims it. APScheduler holds in-memory jobs only; the claim is a row."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from contextlib import suppress
from datetime import date as Date
from datetime import datetime, timedelta
from typing import Any

import structlog
from apscheduler.schedulers.asyncio import AsyncIOScheduler
from apscheduler.triggers.cron import CronTrigger
from apscheduler.triggers.interval import IntervalTrigger
from sqlalchemy import delete
from sqlmodel import col, select

from labeling.database import Database, insert_or_nothing, now
from loop import states
from loop.settings import ProjectSettings, ScheduleSettings
from loop.tables import Adapter, Night, NightEvent, NightState, StageMarker

log = structlog.get_logger()


def latest_due(schedule: ScheduleSettings, at: datetime) -> datetime:
    """The newest due time not after `at`. A local time that a clock change skips or repeats counts once."""
    local = at.astimezone(schedule.zone)
    due = datetime.combine(local.date(), schedule.at, tzinfo=schedule.zone)
    return due if due <= at else datetime.combine(local.date() - timedelta(days=1), schedule.at, tzinfo=schedule.zone)


async def claim(
    database: Database,
    project: ProjectSettings,
    date: Date,
    due_at: datetime,
    recipe: Mapping[str, Any] | None = None,
) -> str | None:
    """The id of the night that this call created; None when that project's night of that date exists already."""
    project.trainer.with_recipe(recipe or {})
    night = Night(project=project.name, date=date, due_at=due_at, recipe=dict(recipe or {}))
    async with database.write() as session:
        await session.execute(insert_or_nothing(session, night))
        kept = (
            await session.execute(select(Night.id).where(Night.project == project.name, Night.date == date))
        ).scalar_one()
        if kept != night.id:
            return None
        session.add(NightEvent(night_id=night.id, kind="state", detail={"to": NightState.CLAIMED, "due": str(due_at)}))
    log.info("night_claimed", project=project.name, date=str(date), night=night.id)
    return night.id


async def claim_due(database: Database, project: ProjectSettings, at: datetime | None = None) -> str | None:
    due = latest_due(project.schedule, at or now())
    return await claim(database, project, due.date(), due)


async def catch_up(database: Database, project: ProjectSettings) -> str | None:
    """The latest missed night only, and none that was due before this project was set up. Mostly just a look."""
    if not project.schedule.enabled:
        return None
    due = latest_due(project.schedule, now())
    async with database.read() as session:
        claimed = select(Night.id).where(Night.project == project.name, Night.date == due.date())
        if (await session.execute(claimed)).first() is not None:
            return None
        base = (
            await session.execute(select(Adapter).where(Adapter.project == project.name, Adapter.version == 1))
        ).scalar_one_or_none()
    if base is None or base.created_at > due:
        return None
    return await claim(database, project, due.date(), due)


def build_scheduler(
    projects: Mapping[str, ProjectSettings],
    on_due: Callable[[ProjectSettings], Awaitable[None]],
    every: Mapping[str, tuple[float, Callable[[], Awaitable[None]]]],
) -> AsyncIOScheduler:
    """Cron jobs for the nights, intervals for the polls: name -> (seconds, job). Not started here."""
    # misfire_grace_time: the default of one second silently drops the job of a busy process.
    scheduler = AsyncIOScheduler(job_defaults={"coalesce": True, "misfire_grace_time": None, "max_instances": 1})
    for project in projects.values():
        if project.schedule.enabled:
            at = project.schedule.at
            trigger = CronTrigger(hour=at.hour, minute=at.minute, second=at.second, timezone=project.schedule.zone)
            scheduler.add_job(_quiet(on_due), trigger, args=[project], id=f"night:{project.name}")
    for name, (seconds, job) in every.items():
        scheduler.add_job(_quiet(job), IntervalTrigger(seconds=seconds), id=name, next_run_time=now())
    return scheduler


def _quiet(job: Callable[..., Awaitable[None]]) -> Callable[..., Awaitable[None]]:
    """A job cut off by our own shutdown is no error, which APScheduler would log with its traceback."""

    async def run(*args: Any) -> None:
        with suppress(asyncio.CancelledError):
            await job(*args)

    return run


async def reopen(database: Database, night_id: str) -> None:
    """A FAILED night goes on where it stood, a SKIPPED one looks for labels anew, as soon as a worker sees it."""
    async with database.write() as session:
        night = await session.get(Night, night_id)
        if night is not None and night.state in (NightState.FAILED, NightState.SKIPPED):
            if night.state == NightState.SKIPPED:
                await session.execute(delete(StageMarker).where(col(StageMarker.night_id) == night_id))
            await states.move(session, night_id, NightState.RUNNING, reason=None, hint=None, finished_at=None)
