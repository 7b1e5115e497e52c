"""Nights are claimed once a date, for the right local date, and only the latest missed one is caught up."""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime, time, timedelta
from pathlib import Path

import pytest
from sqlmodel import select

from labeling.database import Database, now
from loop.schedule import build_scheduler, catch_up, claim, claim_due, latest_due, reopen
from loop.settings import BadRecipe, ProjectSettings, ScheduleSettings
from loop.states import move
from loop.tables import Adapter, Night, NightState, StageMarker


def _project(**schedule: object) -> ProjectSettings:
    settings = ScheduleSettings.model_validate(schedule)
    return ProjectSettings(name="p", base_dir=Path("base"), base_name="base", schedule=settings)


@pytest.mark.parametrize(
    ("at", "zone", "when", "due"),
    [
        (time(2), "UTC", "2026-03-01T02:00:00+00:00", "2026-03-01T02:00:00+00:00"),
        (time(2), "UTC", "2026-03-01T01:59:59+00:00", "2026-02-28T02:00:00+00:00"),
        (time(23, 30), "Pacific/Auckland", "2026-03-01T10:31:00+00:00", "2026-03-01T10:30:00+00:00"),
        (time(2, 30), "Europe/Helsinki", "2026-10-25T12:00:00+00:00", "2026-10-24T23:30:00+00:00"),
    ],
)
def test_latest_due(at: time, zone: str, when: str, due: str) -> None:
    """The newest due time not after the given instant, in the project's own zone."""
    schedule = ScheduleSettings(at=at, time_zone=zone)
    assert latest_due(schedule, datetime.fromisoformat(when)) == datetime.fromisoformat(due)


async def test_a_date_is_claimed_once_by_many(database: Database) -> None:
    """Ten schedulers at the same moment make one night."""
    project = _project()
    ids = await asyncio.gather(*(claim_due(database, project) for _ in range(10)))
    assert sum(night is not None for night in ids) == 1
    async with database.read() as session:
        assert len((await session.execute(select(Night))).scalars().all()) == 1


async def test_the_date_is_the_local_one_of_the_due_time(database: Database) -> None:
    """Half past eleven at night in Auckland is the same local date, whatever the UTC date is."""
    project = _project(at=time(23, 30), time_zone="Pacific/Auckland")
    night_id = await claim_due(database, project, datetime(2026, 3, 1, 10, 45, tzinfo=UTC))
    async with database.read() as session:
        night = await session.get(Night, night_id)
    assert night is not None
    assert night.date.isoformat() == "2026-03-01"


async def test_catch_up_takes_the_latest_missed_night_only(database: Database) -> None:
    """Set up three days ago and down since: one night, the newest; a second start adds none."""
    project = _project()
    async with database.write() as session:
        session.add(
            Adapter(
                name="p@v1", project="p", version=1, digest="d", base_digest="d", created_at=now() - timedelta(days=3)
            )
        )
    assert await catch_up(database, project) is not None
    assert await catch_up(database, project) is None
    async with database.read() as session:
        nights = (await session.execute(select(Night))).scalars().all()
    assert [night.date for night in nights] == [latest_due(project.schedule, now()).date()]


async def test_a_new_installation_catches_up_on_nothing(database: Database) -> None:
    """What was due before the project existed was not missed."""
    project = _project()
    assert await catch_up(database, project) is None
    async with database.write() as session:
        session.add(Adapter(name="p@v1", project="p", version=1, digest="d", base_digest="d"))
    assert await catch_up(database, project) is None


async def test_a_wrong_recipe_is_refused_before_anything_is_claimed(database: Database) -> None:
    """A night's own trainer settings are bounded like the project's."""
    project = _project()
    with pytest.raises(BadRecipe, match="epochs"):
        await claim(database, project, now().date(), now(), {"epochs": -1})
    async with database.read() as session:
        assert not (await session.execute(select(Night))).scalars().all()


async def test_a_skipped_night_looks_again(database: Database) -> None:
    """Labels came after all: the same night runs anew, from its first stage."""
    project = _project()
    night_id = await claim(database, project, now().date(), now())
    assert night_id is not None
    async with database.write() as session:
        await move(session, night_id, NightState.RUNNING)
        session.add(StageMarker(night_id=night_id, stage="sync_labels", token=1, folder="x", digest="d", seconds=1))
        await move(session, night_id, NightState.SKIPPED, reason="0 new labels")
    await reopen(database, night_id)
    async with database.read() as session:
        night = await session.get(Night, night_id)
        assert night is not None
        assert (night.state, night.reason, night.finished_at) == (NightState.RUNNING, None, None)
        assert not (await session.execute(select(StageMarker))).scalars().all()


async def test_jobs_cut_off_by_our_end_are_no_errors(caplog: pytest.LogCaptureFixture) -> None:
    """APScheduler logs a cancelled job with its traceback."""
    begun = asyncio.Event()

    async def job() -> None:
        begun.set()
        await asyncio.sleep(60)

    scheduler = build_scheduler({}, lambda project: job(), {"slow": (60, job)})
    scheduler.start()
    await begun.wait()
    scheduler.shutdown(wait=False)
    await asyncio.sleep(0.05)
    assert [record.message for record in caplog.records if record.levelname == "ERROR"] == []
