"""The running stage's last line, in the database too: whoever watches may be another process than the worker."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import structlog

from labeling.database import Database, now
from labeling.errors import Unavailable
from loop.tables import NightProgress

log = structlog.get_logger()
WRITE_SECONDS = 2.0  # lines come as fast as steps do; nobody reads faster than this


class Live:
    """Night id -> its latest line. Reading is from memory; `kept` copies it into the database while its block runs."""

    def __init__(self) -> None:
        self._lines: dict[str, dict[str, Any]] = {}

    def get(self, night_id: str) -> dict[str, Any] | None:
        return self._lines.get(night_id)

    def put(self, night_id: str, line: dict[str, Any]) -> None:
        self._lines[night_id] = line

    @asynccontextmanager
    async def kept(self, database: Database, night_id: str) -> AsyncIterator[None]:
        """A database that is down for a while costs what would be seen from elsewhere, nothing else."""
        copying = asyncio.create_task(self._copy(database, night_id), name=f"progress of {night_id}")
        try:
            yield
        finally:
            copying.cancel()
            await asyncio.gather(copying, return_exceptions=True)
            self._lines.pop(night_id, None)

    async def _copy(self, database: Database, night_id: str) -> None:
        written: dict[str, Any] | None = None
        while True:
            line = self._lines.get(night_id)
            if line is not None and line is not written:
                written = line
                try:
                    async with database.write() as session:
                        await session.merge(NightProgress(night_id=night_id, at=now(), line=line))
                except Unavailable as error:
                    log.info("progress_not_written", night=night_id, reason=str(error))
            await asyncio.sleep(WRITE_SECONDS)
