"""The schema's history (Alembic). `upgrade(url)` brings any database to this release's schema, once or again."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

from alembic import command
from alembic.config import Config
from sqlalchemy import Connection, event, text
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine
from sqlalchemy.pool import NullPool

from labeling.database import translated

FOLDER = Path(__file__).parent


def config(connection: Connection | None = None) -> Config:
    """For Alembic's own commands; `connection` is where they work."""
    alembic = Config()
    alembic.set_main_option("script_location", str(FOLDER))
    alembic.attributes["connection"] = connection
    return alembic


def upgrade(url: str) -> None:
    """From a thread without an event loop: `await asyncio.to_thread(upgrade, url)` inside one."""
    asyncio.run(_upgrade(url))


async def _upgrade(url: str) -> None:
    engine = create_async_engine(url, poolclass=NullPool)
    try:
        with translated():
            await _locked_upgrade(engine)
    finally:
        await engine.dispose()


async def _locked_upgrade(engine: AsyncEngine) -> None:
    """All in one transaction, also where the process is killed in it. `serve` and `work` may start at the same instant
    on an empty database: the second waits for the first."""
    if engine.dialect.name == "sqlite":
        event.listen(engine.sync_engine, "connect", _open_no_transactions)
    async with engine.begin() as connection:
        if engine.dialect.name == "postgresql":
            await connection.execute(text("SELECT pg_advisory_xact_lock(hashtext('nightschool schema'))"))
        else:
            await connection.execute(text("BEGIN IMMEDIATE"))
        await connection.run_sync(lambda sync: command.upgrade(config(sync), "head"))


def _open_no_transactions(connection: Any, _record: object) -> None:
    """The driver would begin one only before a change of rows: tables would be made one by one, each for good."""
    connection.isolation_level = None
