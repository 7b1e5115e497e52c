"""One database handle for SQLite (WAL, one writer) and PostgreSQL; sessions are short and explicit.

`read()` gives a session for queries; `write()` gives one transaction that is committed, durably, when the block ends.
"""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from enum import StrEnum
from typing import Any, TypeVar

from sqlalchemy import Column, Connection, DateTime, Dialect, Engine, Enum, create_engine, event, text
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.exc import DBAPIError, OperationalError
from sqlalchemy.exc import TimeoutError as PoolTimeout
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession, create_async_engine
from sqlalchemy.sql.dml import Insert
from sqlalchemy.types import TypeDecorator
from sqlmodel import SQLModel

from labeling.errors import Unavailable

T = TypeVar("T")


class DatabaseUnavailable(Unavailable):
    code = "database_unavailable"
    default_hint = "Check that the database is reachable, has room on its disk and is not opened read-only."


class TransactionLost(DatabaseUnavailable):
    """PostgreSQL ended it in favour of another one: nothing of it is stored, and it may be tried again at once."""

    code = "transaction_lost"
    default_hint = "Try again; should it go on, look at PostgreSQL's log for what locks what."


class UtcDateTime(TypeDecorator[datetime]):
    """Aware UTC datetimes on both databases; SQLite itself forgets the zone."""

    impl = DateTime(timezone=True)
    cache_ok = True

    def process_bind_param(self, value: datetime | None, dialect: Dialect) -> datetime | None:
        if value is not None and value.tzinfo is None:
            raise ValueError(f"a datetime without time zone: {value!r}")
        return None if value is None else value.astimezone(UTC)

    def process_result_value(self, value: datetime | None, dialect: Dialect) -> datetime | None:
        if value is None:
            return None
        return value.replace(tzinfo=UTC) if value.tzinfo is None else value.astimezone(UTC)


def now() -> datetime:
    return datetime.now(UTC)


def new_id(prefix: str) -> str:
    """`prefix_` + 11 hex digits of milliseconds + 16 random ones: sorts by time, never repeats."""
    return f"{prefix}_{time.time_ns() // 1_000_000:011x}{secrets.token_hex(8)}"


def insert_or_nothing(session: AsyncSession, *rows: SQLModel) -> Insert:
    """INSERT of rows of one table ... ON CONFLICT DO NOTHING, in the session's dialect: our form of "once"."""
    build = postgresql.insert if session.get_bind().dialect.name == "postgresql" else sqlite.insert
    return build(type(rows[0])).values([row.model_dump() for row in rows]).on_conflict_do_nothing()


async def one_at_a_time(session: AsyncSession, name: str) -> None:
    """Until the transaction ends, on PostgreSQL; SQLite has one writer anyway."""
    if session.get_bind().dialect.name == "postgresql":
        await session.execute(text("SELECT pg_advisory_xact_lock(hashtext(:name))"), {"name": name})


def enum_column(kind: type[StrEnum]) -> Any:
    """Stores the values as plain text: readable in SQL, and a new value needs no migration of a type."""
    values = Enum(
        kind, native_enum=False, create_constraint=False, length=32, values_callable=lambda e: [m.value for m in e]
    )
    return Column(values, nullable=False)


class Database:
    def __init__(self, url: str) -> None:
        self.url = url
        self.is_sqlite = url.startswith("sqlite")
        self.engine: AsyncEngine = (
            _sqlite_engine(url) if self.is_sqlite else create_async_engine(url, pool_size=10, pool_pre_ping=True)
        )
        self._writer = asyncio.Lock()
        # For `transact` on SQLite: one thread with one connection.
        self.writing_engine: Engine | None = _sqlite_writing_engine(url) if self.is_sqlite else None
        self._thread = ThreadPoolExecutor(1, "database")

    @asynccontextmanager
    async def read(self) -> AsyncIterator[AsyncSession]:
        with translated():
            async with AsyncSession(self.engine, expire_on_commit=False) as session:
                yield session

    @asynccontextmanager
    async def write(self) -> AsyncIterator[AsyncSession]:
        """One transaction; on SQLite one at a time, IMMEDIATE: a lock shows at the start, not at commit."""
        with translated():
            if not self.is_sqlite:
                async with AsyncSession(self.engine, expire_on_commit=False) as session, session.begin():
                    yield session
                return
            async with self._writer, AsyncSession(self.engine, expire_on_commit=False) as session, session.begin():
                await session.execute(text("BEGIN IMMEDIATE"))
                yield session

    async def transact(self, work: Callable[[Connection], T]) -> T:
        """One transaction, run in one go: the quick way for a path that every request takes.

        On SQLite it is one visit to one thread. Each statement of a session is a visit, and under load each visit waits
        for the event loop to let go of the interpreter. A caller that is cancelled still waits for the commit.
        """
        with translated():
            if self.writing_engine is None:
                async with self.engine.begin() as connection:
                    return await connection.run_sync(work)
            async with self._writer:
                loop = asyncio.get_running_loop()
                done = loop.run_in_executor(self._thread, _transacted, self.writing_engine, work)
                try:
                    return await asyncio.shield(done)
                except asyncio.CancelledError:
                    await asyncio.wait((done,))
                    raise

    async def create_tables(self) -> None:
        """The current schema without migrations: for tests and throw-away databases."""
        async with self.engine.begin() as connection:
            await connection.run_sync(SQLModel.metadata.create_all)

    async def close(self) -> None:
        """Its engines may be used again: they begin with new connections."""
        await self.engine.dispose()
        if self.writing_engine is not None:
            self.writing_engine.dispose()
        self._thread.shutdown(wait=False)
        self._thread = ThreadPoolExecutor(1, "database")


# PostgreSQL's classes for a server that is down, full, starting or read-only, and for transactions that lost.
UNAVAILABLE_STATES = ("08", "28", "3D", "40", "53", "57", "58", "25006")
LOST_STATES = ("40",)


class translated:
    """Turns the driver's "unreachable, locked, full, read-only" into our retryable error, nothing else."""

    def __enter__(self) -> None:
        return None

    def __exit__(self, _: object, error: BaseException | None, trace: object) -> None:
        if error is not None and _unavailable(error):
            kind = TransactionLost if _state(error).startswith(LOST_STATES) else DatabaseUnavailable
            raise kind(f"the database refused the operation: {str(getattr(error, 'orig', error))[:300]}") from error


def _unavailable(error: BaseException) -> bool:
    """asyncpg's errors arrive wrapped as plain DBAPIError: the SQLSTATE tells what happened."""
    if isinstance(error, OperationalError | ConnectionError | OSError | PoolTimeout):
        return True
    if not isinstance(error, DBAPIError):
        return False
    return error.connection_invalidated or _state(error).startswith(UNAVAILABLE_STATES)


def _state(error: BaseException) -> str:
    return str(getattr(getattr(error, "orig", None), "sqlstate", None) or "")


def _sqlite_engine(url: str) -> AsyncEngine:
    engine = create_async_engine(url, connect_args={"timeout": 10}, pool_size=8, max_overflow=8)
    _prepare_connections(engine.sync_engine)
    return engine


def _sqlite_writing_engine(url: str) -> Engine:
    engine = create_engine(url.replace("+aiosqlite", "+pysqlite", 1), connect_args={"timeout": 10}, pool_size=1)
    _prepare_connections(engine)
    return engine


def _transacted(engine: Engine, work: Callable[[Connection], T]) -> T:
    with engine.connect() as connection:
        connection.exec_driver_sql("BEGIN IMMEDIATE")
        done = work(connection)
        connection.commit()
        return done


def _prepare_connections(engine: Engine) -> None:
    @event.listens_for(engine, "connect")
    def _connect(connection: Any, _record: object) -> None:
        # Transactions are opened by us (BEGIN IMMEDIATE above), not by the driver's own guess.
        connection.isolation_level = None
        cursor = connection.cursor()
        for pragma in ("journal_mode=WAL", "synchronous=FULL", "foreign_keys=ON", "busy_timeout=10000"):
            cursor.execute(f"PRAGMA {pragma}")
        cursor.close()
