"""Exchanges into the database, once each, and feedback linked to the exchange that it is about."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime, timedelta
from typing import Any, Protocol, TypeVar

from sqlalchemy import ColumnElement, Connection, Select, and_, case, text, update
from sqlalchemy.dialects import sqlite
from sqlalchemy.engine import CursorResult
from sqlalchemy.ext.asyncio import AsyncSession
from sqlmodel import col, select

from labeling.database import Database, insert_or_nothing, now
from labeling.tables import SEEKING_SESSION, UNLINKED, Exchange, Feedback

ROWS_PER_STATEMENT = 200  # below the bound-parameter limits of both databases
VALUES_PER_STATEMENT = 500
# Two transactions that store a feedback and its exchange at the same moment don't see each other: a second look does.
LOOK_AGAIN = timedelta(minutes=2)
TRIES = 2


class Linkable(Protocol):
    """A feedback that is not stored yet."""

    project: str
    completion_id: str | None
    request_id: str | None
    exchange_id: str | None
    link_at: datetime | None


async def record(session: AsyncSession, rows: Sequence[Exchange]) -> int:
    """How many were new. The order by key keeps concurrent batches from deadlocking."""
    return await record_values(session, [row.model_dump() for row in rows])


async def record_values(session: AsyncSession, rows: Sequence[Mapping[str, Any]]) -> int:
    """The same for rows that nobody needs as objects, each with all columns: the gateway writes thousands a second."""
    ordered = sorted(rows, key=lambda row: (row["project"], row["completion_id"]))
    stored = 0
    for start in range(0, len(ordered), ROWS_PER_STATEMENT):
        part = ordered[start : start + ROWS_PER_STATEMENT]
        stored += await _insert(session, part)
        projects: dict[str, list[Mapping[str, Any]]] = {}
        for row in part:
            projects.setdefault(row["project"], []).append(row)
        for project, theirs in projects.items():
            ours = col(Feedback.project) == project  # the indexes begin with it
            completions = [row["completion_id"] for row in theirs]
            await _link(session, _of_completion(), ours & col(Feedback.completion_id).in_(completions))
            if requests := [row["request_id"] for row in theirs if row["request_id"]]:
                await _link(session, _of_request(), ours & col(Feedback.request_id).in_(requests))
            if sessions := sorted({row["session_id"] for row in theirs if row["session_id"]}):
                await _wake(session, ours & col(Feedback.session_id).in_(sessions))
    return stored


async def _insert(session: AsyncSession, rows: Sequence[Mapping[str, Any]]) -> int:
    """On SQLite one small statement, run for each row: one with thousands of parameters would be built anew each time,
    which takes longer than what it does.
    """
    if session.get_bind().dialect.name != "sqlite":
        result = await session.execute(insert_or_nothing(session, *(Exchange(**row) for row in rows)))
    else:
        result = await (await session.connection()).execute(_SQLITE_INSERT, [dict(row) for row in rows])
    assert isinstance(result, CursorResult)
    return result.rowcount


_SQLITE_INSERT = sqlite.insert(Exchange).on_conflict_do_nothing().execution_options(preserve_rowcount=True)


async def link_due(database: Database, project: str) -> None:
    """Feedback whose exchange is to be looked for by now is linked, by session too, where it is here.

    Each is looked for at the first call after it came and once more `LOOK_AGAIN` later; then only when an exchange
    comes that it may be about. So what will never be linked costs nothing.
    """
    while True:
        async with database.write() as session:
            due = await _due(session, project)
            if not due:
                return
            which = col(Feedback.id).in_(due)
            for exchange in (_of_completion(), _of_request(), _of_session()):
                await _link(session, exchange, which)
            again = text(UNLINKED), col(Feedback.link_tries) + 1 < TRIES
            await session.execute(
                update(Feedback)
                .where(which)
                .values(link_at=case((and_(*again), now() + LOOK_AGAIN)), link_tries=col(Feedback.link_tries) + 1)
                .execution_options(synchronize_session=False)
            )


async def _due(session: AsyncSession, project: str) -> list[str]:
    """Rows that an exchange's own transaction is just linking or waking are left to it: it is not to be overwritten."""
    due = (
        select(Feedback.id)
        .where(col(Feedback.project) == project, col(Feedback.link_at) <= now())
        .order_by(col(Feedback.link_at))
        .limit(ROWS_PER_STATEMENT)
        .with_for_update(skip_locked=True)
    )
    return list((await session.execute(due)).scalars())


async def _wake(session: AsyncSession, which: ColumnElement[bool]) -> None:
    """Not linked at once: of several exchanges of the session that come together, the last before it counts."""
    found = _of_session().scalar_subquery()
    await session.execute(
        update(Feedback)
        .where(text(SEEKING_SESSION), which, found.is_not(None))
        .values(link_at=now())
        .execution_options(synchronize_session=False)
    )


async def link_new(session: AsyncSession, rows: Sequence[Linkable]) -> None:
    """`link`, in a session's transaction."""
    await (await session.connection()).run_sync(link, rows)


def link(connection: Connection, rows: Sequence[Linkable]) -> None:
    """Sets `exchange_id` on feedback that is not stored yet, where its exchange is."""
    for project, theirs in _by_project(rows).items():
        completions = {row.completion_id for row in theirs if row.completion_id}
        requests = {row.request_id for row in theirs if row.request_id and not row.completion_id}
        by_completion = _ids(connection, project, col(Exchange.completion_id), sorted(completions))
        by_request = _ids(connection, project, col(Exchange.request_id), sorted(requests))
        for row in theirs:
            if row.completion_id:
                row.exchange_id = by_completion.get(row.completion_id)
            elif row.request_id:
                row.exchange_id = by_request.get(row.request_id)
            if row.exchange_id is not None:
                row.link_at = None


class _OfProject(Protocol):
    project: str


R = TypeVar("R", bound=_OfProject)


def _by_project(rows: Sequence[R]) -> dict[str, list[R]]:
    found: dict[str, list[R]] = {}
    for row in rows:
        found.setdefault(row.project, []).append(row)
    return found


def _ids(connection: Connection, project: str, column: Any, values: list[str]) -> dict[str, str]:
    """value -> exchange; the newest where a client used its request id more than once."""
    found: dict[str, str] = {}
    for start in range(0, len(values), VALUES_PER_STATEMENT):
        some = column.in_(values[start : start + VALUES_PER_STATEMENT])
        named = select(column, col(Exchange.id)).where(col(Exchange.project) == project, some)
        found.update(
            (value, exchange) for value, exchange in connection.execute(named.order_by(col(Exchange.created_at)))
        )
    return found


async def _link(session: AsyncSession, exchange: Select[Any], which: ColumnElement[bool]) -> None:
    found = exchange.scalar_subquery()
    statement = update(Feedback).where(col(Feedback.exchange_id).is_(None), which, found.is_not(None))
    await session.execute(statement.values(exchange_id=found).execution_options(synchronize_session=False))


def _of_completion() -> Select[Any]:
    return _newest().where(col(Exchange.completion_id) == col(Feedback.completion_id))


def _of_request() -> Select[Any]:
    unnamed = col(Feedback.completion_id).is_(None)
    return _newest().where(unnamed, col(Exchange.request_id) == col(Feedback.request_id))


def _of_session() -> Select[Any]:
    """The session's last exchange before the feedback. Only when folding: by then every earlier one is stored.

    An imported id that may be of either stands in both columns: it is a session's when no completion has it.
    """
    either = col(Feedback.completion_id) == col(Feedback.session_id)
    unnamed = (col(Feedback.completion_id).is_(None) | either) & col(Feedback.request_id).is_(None)
    earlier = col(Exchange.created_at) <= col(Feedback.created_at)
    return _newest().where(unnamed, col(Exchange.session_id) == col(Feedback.session_id), earlier)


def _newest() -> Select[Any]:
    return (
        select(col(Exchange.id))
        .where(col(Exchange.project) == col(Feedback.project))
        .order_by(col(Exchange.created_at).desc())
        .limit(1)
        .correlate(Feedback)
    )
