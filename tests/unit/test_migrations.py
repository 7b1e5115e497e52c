"""The migrated schema is the one that the code declares, on both databases."""

from __future__ import annotations

import asyncio
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from sqlalchemy import Connection, inspect, text
from sqlmodel import SQLModel

import labeling.tables
import loop.tables
import service.tables
from labeling.database import Database
from service.migrations import upgrade

TABLES = (labeling.tables, loop.tables, service.tables)  # imported for what they register


# Alembic can't compare an index with an order on SQLite: their text is compared.
ORDERED = {"ix_review_items_queue"}


def differences(connection: Connection) -> list[Any]:
    options = {
        "compare_type": True,
        "compare_server_default": True,
        "include_object": lambda _object, name, kind, *_: kind != "index" or name not in ORDERED,
    }
    return list(compare_metadata(MigrationContext.configure(connection, opts=options), SQLModel.metadata))


def ordered_indexes(connection: Connection) -> dict[str, str]:
    of = {"sqlite": "SELECT name, sql FROM sqlite_master", "postgresql": "SELECT indexname, indexdef FROM pg_indexes"}
    found = {name: ddl for name, ddl in connection.execute(text(of[connection.dialect.name])) if name in ORDERED}
    assert found.keys() == ORDERED
    return found


def unique_columns(connection: Connection) -> dict[str, set[tuple[str, ...]]]:
    """Alembic does not compare unnamed unique constraints on SQLite: our form of "once" rests on them."""
    found = inspect(connection)
    return {
        table: {tuple(sorted(c["column_names"])) for c in found.get_unique_constraints(table)}
        for table in found.get_table_names()
        if table != "alembic_version"
    }


async def test_migrated_is_declared(database: Database) -> None:
    """No difference in tables, columns, types, indexes and unique keys; a second upgrade changes nothing."""
    async with database.engine.begin() as connection:
        declared = await connection.run_sync(unique_columns), await connection.run_sync(ordered_indexes)
        await connection.run_sync(SQLModel.metadata.drop_all)
    for _ in range(2):
        await asyncio.to_thread(upgrade, database.url)
    async with database.engine.connect() as connection:
        assert await connection.run_sync(differences) == []
        assert (await connection.run_sync(unique_columns), await connection.run_sync(ordered_indexes)) == declared


KILLED = """
import os, signal, sys
from sqlalchemy import Engine, event
from service.migrations import upgrade

@event.listens_for(Engine, "before_cursor_execute")
def _(connection, cursor, statement, *_):
    if statement.strip().startswith("CREATE TABLE exchanges"):
        os.kill(os.getpid(), signal.SIGKILL)

upgrade(sys.argv[1])
"""


async def test_killed_within_it_changes_nothing(database: Database) -> None:
    """On SQLite, too, whose driver would make each table for good; the next start does it all."""
    async with database.engine.begin() as connection:
        await connection.run_sync(SQLModel.metadata.drop_all)
    command = [sys.executable, "-c", KILLED, database.url]
    killed = await asyncio.to_thread(subprocess.run, command, cwd=Path(__file__).parents[2], check=False)
    assert killed.returncode == -signal.SIGKILL
    await asyncio.to_thread(upgrade, database.url)
    async with database.engine.connect() as connection:
        assert await connection.run_sync(differences) == []
