"""Old exchanges go, those that something needs stay, and /metrics counts both."""

from __future__ import annotations

import asyncio
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import pytest
from sqlalchemy import event

from labeling import exchanges, retention
from labeling.database import Database, now
from labeling.feedback import fold
from labeling.retention import forget_old_exchanges
from labeling.settings import LabelingSettings
from labeling.tables import Exchange, ExchangeRetention, Feedback, FeedbackKind
from loop.runner import Runner
from loop.settings import EngineSettings, MlflowSettings, ProjectSettings
from loop.worker import Worker
from service import app
from tests.running import NOWHERE, PROJECT, count, eventually, offline_clients, rows, service, settings_for
from tests.unit.test_feedback import exchange, feedback, store
from tests.unit.test_round_cost import steps

OLD = timedelta(days=40)


async def test_only_what_is_old_and_needed_by_nothing_goes(database: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    """Feedback of any kind, members and good answers keep theirs, in whichever batch it comes; a session's too."""
    monkeypatch.setattr(retention, "BATCH", 2)
    at = now() - OLD
    plain = [exchange(f"plain {number}", created_at=at + timedelta(minutes=number)) for number in range(5)]
    flagged, liked = exchange("flagged", created_at=at), exchange("liked", created_at=at)
    asked = exchange("asked", session_id="s", created_at=at)
    fresh, foreign = exchange("fresh", created_at=now() - timedelta(days=29)), exchange(project="other", created_at=at)
    await store(database, *plain, flagged, liked, asked, fresh, foreign)
    await store(database, feedback(flagged), feedback(liked, kind=FeedbackKind.RATING, value=1))
    await fold(database, PROJECT, LabelingSettings())
    await store(database, feedback(session_id="s"))
    assert await forget_old_exchanges(database, PROJECT, 30) == len(plain)
    left = {row.id for row in await rows(database, Exchange)}
    assert left == {row.id for row in (flagged, liked, asked, fresh, foreign)}
    assert all(row.exchange_id for row in await rows(database, Feedback))
    assert await forget_old_exchanges(database, PROJECT, 30) == 0
    (counts,) = await rows(database, ExchangeRetention)
    assert (counts.deleted, counts.needed) == (len(plain), 3)


async def test_nothing_goes_unless_days_are_set(database: Database) -> None:
    await store(database, exchange(created_at=now() - timedelta(days=5000)))
    assert LabelingSettings().keep_exchanges_days == 0
    assert await forget_old_exchanges(database, PROJECT, 0) == 0
    assert await count(database, Exchange) == 1


async def test_the_writer_is_free_between_batches(database: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    """A deletion of many rows is many transactions, so that feedback is committed meanwhile."""
    monkeypatch.setattr(retention, "BATCH", 10)
    await store(database, *(exchange(str(number), created_at=now() - OLD) for number in range(95)))
    transactions = 0
    write = database.write

    def counted() -> object:
        nonlocal transactions
        transactions += 1
        return write()

    monkeypatch.setattr(database, "write", counted)
    assert await forget_old_exchanges(database, PROJECT, 30) == 95
    assert transactions >= 10


async def test_a_look_goes_in_pages(database: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    """However many there are, whether they go or stay: no statement reads or deletes more than a page, no transaction
    deletes twice, and what waits for the writer has its turn before the look is done.
    """
    monkeypatch.setattr(retention, "BATCH", 10)
    monkeypatch.setattr(exchanges, "ROWS_PER_STATEMENT", 10)
    plain = [exchange(f"plain {number}", created_at=now() - OLD) for number in range(60)]
    needed = [exchange(f"needed {number}", created_at=now() - OLD) for number in range(40)]
    await store(database, *plain, *needed, *(feedback(one) for one in needed))
    read: list[int] = []
    deleted: list[int] = []
    in_one: list[int] = []
    late = exchange("late")
    others: list[asyncio.Task[None]] = []

    def done(_connection: Any, cursor: Any, statement: str, *_rest: Any) -> None:
        if statement.startswith("DELETE"):
            deleted.append(cursor.rowcount)
            in_one[-1] += 1
        elif statement.startswith("SELECT"):
            read.append(len(getattr(cursor, "_rows", ())))
        if deleted and not others:
            others.append(asyncio.create_task(store(database, late)))
            others[0].add_done_callback(lambda _: in_between.append(not looking.done()))

    in_between: list[bool] = []
    engine = database.engine.sync_engine
    event.listen(engine, "begin", lambda _connection: in_one.append(0))
    event.listen(engine, "after_cursor_execute", done)
    looking = asyncio.create_task(forget_old_exchanges(database, PROJECT, 30))
    assert await looking == sum(deleted) == 60
    await others[0]
    assert in_between == [True]
    assert max(read) == 10
    assert max(deleted) <= 10
    assert max(in_one) == 1
    assert {row.id for row in await rows(database, Exchange)} == {one.id for one in (*needed, late)}
    in_one.clear()
    deleted.clear()
    assert await forget_old_exchanges(database, PROJECT, 30) == 0
    assert deleted == [], "what stays is only read"


async def test_a_look_costs_what_is_old(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each page begins where the last one ended: twice as many cost twice as much, also where all of them stay."""
    monkeypatch.setattr(retention, "BATCH", 10)
    seen = []
    for number in (150, 300):
        database = Database(f"sqlite+aiosqlite:///{tmp_path}/{number}.db")
        await database.create_tables()
        old = [exchange(str(place), created_at=now() - OLD) for place in range(number)]
        await store(database, *old, *(feedback(one) for one in old))
        await forget_old_exchanges(database, PROJECT, 30)  # links first what came with them
        async with steps(database) as done:
            assert await forget_old_exchanges(database, PROJECT, 30) == 0
        seen.append(done[0])
        await database.close()
    half, whole = seen
    assert 0 < whole < 2.3 * half, seen


async def test_the_worker_looks(database: Database, tmp_path: Path) -> None:
    """At its start and every hour, for each project by its own days; with every outside system down."""
    await store(database, exchange(created_at=now() - OLD), exchange(project="other", created_at=now() - OLD))
    known: dict[str, Any] = {"base_dir": "/models/base", "base_name": "base", "schedule": {"enabled": False}}
    days = {PROJECT: 30, "other": 0}
    projects = {
        name: ProjectSettings.model_validate({**known, "name": name, "labeling": {"keep_exchanges_days": keep}})
        for name, keep in days.items()
    }
    clients = offline_clients(database, tmp_path)
    worker = Worker(Runner(clients, projects, EngineSettings(), tmp_path), MlflowSettings(url=NOWHERE))
    await worker.start()
    try:

        async def gone() -> bool:
            return {row.project for row in await rows(database, Exchange)} == {"other"}

        await eventually(gone, seconds=20)
    finally:
        await worker.stop()
        await clients.label_studio.close()


async def test_metrics_tell_what_was_deleted(database: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also what another process deleted."""
    monkeypatch.setattr(app, "RETENTION_SECONDS", 0.05)
    await store(database, exchange(created_at=now() - OLD), kept := exchange(created_at=now() - OLD), feedback(kept))
    async with service(database, settings_for(["http://127.0.0.1:9"])) as running:
        await forget_old_exchanges(database, PROJECT, 30)
        async with httpx.AsyncClient(base_url=running.url, trust_env=False) as client:

            async def shown(line: str) -> bool:
                return line in (await client.get("/metrics")).text

            await eventually(partial(shown, f'nightschool_exchanges_deleted{{project="{PROJECT}"}} 1.0'))
            await eventually(partial(shown, f'nightschool_exchanges_needed{{project="{PROJECT}"}} 1.0'))
