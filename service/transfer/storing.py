"""A batch of rows into the database, in one transaction: new ones stored, known ones counted, bad ones refused alone.

Sending a batch again changes nothing: each row's own key decides.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from sqlalchemy import tuple_
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.ext.asyncio import AsyncSession
from sqlmodel import SQLModel, col, select

from labeling.database import Database, insert_or_nothing, translated
from labeling.errors import Unavailable
from labeling.exchanges import ROWS_PER_STATEMENT, link_new, record
from labeling.tables import Exchange, Feedback
from service.transfer.own_rows import imported_tables, table_of

Numbered = tuple[int, SQLModel]  # with its line


@dataclass
class Outcome:
    """By table. `refused`: (line, reason)."""

    stored: Counter[str] = field(default_factory=Counter)
    duplicates: Counter[str] = field(default_factory=Counter)
    refused: list[tuple[int, str]] = field(default_factory=list)
    left_out: int = 0  # lines that hold nothing to store


async def store(
    database: Database, rows: Sequence[Numbered], outcome: Outcome, *, project: str = "", dry_run: bool = False
) -> None:
    """`project`: the only one that rows may belong to, by what they refer to as well; "" lets them be of any.

    `dry_run` only looks which keys are known; it sees no parents that would come with the same file.
    """
    by_table: dict[str, list[Numbered]] = defaultdict(list)
    for line, row in rows:
        by_table[str(row.__tablename__)].append((line, row))
    ordered = [by_table[name] for name in imported_tables() if name in by_table]
    if dry_run:
        async with database.read() as session:
            for part in ordered:
                await _look(session, part, outcome)
        return
    # Counted aside: a transaction that fails must leave no counts behind.
    found = Outcome()
    async with database.write() as session:
        for part in ordered:
            await _table(session, part, found, project)
    outcome.stored += found.stored
    outcome.duplicates += found.duplicates
    outcome.refused += found.refused


async def _table(session: AsyncSession, rows: list[Numbered], outcome: Outcome, project: str) -> None:
    for start in range(0, len(rows), ROWS_PER_STATEMENT):
        part = await _with_parents(session, rows[start : start + ROWS_PER_STATEMENT], outcome, project)
        if part:
            await _insert(session, part, outcome)


async def _insert(session: AsyncSession, rows: list[Numbered], outcome: Outcome) -> None:
    """A row that the database refuses must not take the others with it."""
    name = str(rows[0][1].__tablename__)
    try:
        with translated():
            async with session.begin_nested():
                stored = await _stored(session, [row for _, row in rows])
    except Unavailable:
        raise
    except SQLAlchemyError as error:
        if len(rows) > 1:
            for row in rows:
                await _insert(session, [row], outcome)
            return
        outcome.refused.append((rows[0][0], f"the database refuses it: {str(getattr(error, 'orig', error))[:200]}"))
        return
    taken = await _taken(session, rows) if stored < len(rows) else []
    outcome.refused += [(line, "its id is taken by a row of another project") for line in taken]
    outcome.stored[name] += stored
    outcome.duplicates[name] += len(rows) - stored - len(taken)


async def _taken(session: AsyncSession, rows: list[Numbered]) -> list[int]:
    """Lines whose key another project's row has: they are not duplicates. Exchanges have keys of their project."""
    table = table_of(rows[0][1])
    keys = list(table.primary_key.columns)
    if table.name == "exchanges" or "project" not in table.columns or len(keys) > 1:
        return []
    (key,) = keys
    named = [getattr(row, key.name) for _, row in rows]
    found = (await session.execute(select(key, table.columns["project"]).where(key.in_(named)))).all()
    projects = {identity: project for identity, project in found}  # noqa: C416  # rows are no pairs to mypy
    return [
        line
        for line, row in rows
        if projects.get(getattr(row, key.name), getattr(row, "project")) != getattr(row, "project")  # noqa: B009
    ]


async def _stored(session: AsyncSession, rows: list[SQLModel]) -> int:
    if isinstance(rows[0], Exchange):
        return await record(session, [row for row in rows if isinstance(row, Exchange)])
    if isinstance(rows[0], Feedback):
        loose = [row for row in rows if isinstance(row, Feedback) and row.exchange_id is None]
        await link_new(session, loose)
        for row in rows:
            if isinstance(row, Feedback) and row.exchange_id is not None:
                row.link_at = None  # nothing is to be looked for
    keys = list(table_of(rows[0]).primary_key.columns)
    # By key, so that two imports at once can't lock each other out on PostgreSQL.
    ordered = sorted(rows, key=lambda row: tuple(str(getattr(row, key.name)) for key in keys))
    result = await session.execute(insert_or_nothing(session, *ordered).returning(keys[0]))
    return len(result.all())


async def _with_parents(session: AsyncSession, rows: list[Numbered], outcome: Outcome, project: str) -> list[Numbered]:
    """A reference that may be empty is emptied where its row is not here; else the line is refused."""
    table = table_of(rows[0][1])
    for column in table.columns:
        for key in column.foreign_keys:
            named = {getattr(row, column.name) for _, row in rows} - {None}
            if not named or key.column.table is table:
                continue
            parent = key.column.table
            there = select(key.column).where(key.column.in_(named))
            if project and "project" in parent.columns:
                there = there.where(parent.columns["project"] == project)
            found = set((await session.execute(there)).scalars())
            kept = []
            for line, row in rows:
                value = getattr(row, column.name)
                if value is None or value in found:
                    kept.append((line, row))
                elif column.nullable:
                    setattr(row, column.name, None)
                    kept.append((line, row))
                else:
                    outcome.refused.append((line, f"{column.name} {value}: no such row in {parent.name}"))
            rows = kept
    return rows


async def _look(session: AsyncSession, rows: list[Numbered], outcome: Outcome) -> None:
    table = table_of(rows[0][1])
    keys: list[Any] = list(table.primary_key.columns)
    if table.name == "exchanges":
        keys = [col(Exchange.project), col(Exchange.completion_id)]
    seen: set[tuple[Any, ...]] = set()
    for start in range(0, len(rows), ROWS_PER_STATEMENT):
        wanted = [tuple(getattr(row, key.name) for key in keys) for _, row in rows[start : start + ROWS_PER_STATEMENT]]
        known = (await session.execute(select(*keys).where(tuple_(*keys).in_(wanted)))).all()
        seen |= {tuple(row) for row in known}
        for key in wanted:
            (outcome.duplicates if key in seen else outcome.stored)[table.name] += 1
            seen.add(key)
