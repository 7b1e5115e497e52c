"""Hints from the process that serves HTTP to the one that works, over PostgreSQL's NOTIFY: many in a while are one.

Nothing is kept: a hint that nobody hears costs waiting for the next poll.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import asyncpg
import structlog
from sqlalchemy import text
from sqlalchemy.exc import SQLAlchemyError

from labeling.database import Database
from labeling.errors import NightschoolError

log = structlog.get_logger(__name__)
CHANNEL = "nightschool_label_hints"
BETWEEN_SECONDS = 0.2
RECONNECT_SECONDS = 5.0
ALIVE_SECONDS = 30.0


class Announcer:
    """`hint` never waits; at most one notice a project every `BETWEEN_SECONDS` goes out."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self._waiting: set[str] = set()
        self._some = asyncio.Event()

    def hint(self, project: str) -> None:
        self._waiting.add(project)
        self._some.set()

    @asynccontextmanager
    async def running(self, _: object) -> AsyncIterator[None]:
        """A lifespan of the HTTP application."""
        task = asyncio.create_task(self._run(), name="announce hints")
        try:
            yield
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

    async def _run(self) -> None:
        while True:
            await self._some.wait()
            projects, self._waiting = self._waiting, set()
            self._some.clear()
            try:
                async with self._database.write() as session:
                    for project in projects:
                        await session.execute(
                            text("SELECT pg_notify(:channel, :project)"), {"channel": CHANNEL, "project": project}
                        )
            except (NightschoolError, SQLAlchemyError) as error:
                log.warning("hints_not_announced", projects=sorted(projects), reason=str(error))
            await asyncio.sleep(BETWEEN_SECONDS)


async def listen(database: Database, hint: Callable[[str], None]) -> None:
    """For ever; a connection that breaks is made again."""

    def heard(_connection: Any, _pid: int, _channel: str, project: str) -> None:
        hint(project)

    while True:
        try:
            async with database.engine.connect() as connection:
                raw = await connection.get_raw_connection()
                driver: Any = raw.driver_connection
                await driver.add_listener(CHANNEL, heard)
                try:
                    while not driver.is_closed():
                        await asyncio.sleep(ALIVE_SECONDS)
                        await driver.execute("SELECT 1")  # a connection that broke silently is noticed
                finally:
                    if not driver.is_closed():
                        await driver.remove_listener(CHANNEL, heard)
        except (OSError, SQLAlchemyError, asyncpg.PostgresError, asyncpg.InterfaceError) as error:
            log.warning("hints_not_heard", reason=f"{type(error).__name__} {error}")
        await asyncio.sleep(RECONNECT_SECONDS)
