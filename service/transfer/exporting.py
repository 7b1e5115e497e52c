"""Everything that is known, as JSON lines: a first line, {"table", "row"} for each row, a last line with the counts.

One read transaction: what is written meanwhile is in none of the tables. Pages by key keep the memory bounded.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any

import msgspec
from sqlalchemy import ColumnElement, Table, select, text, tuple_
from sqlalchemy.ext.asyncio import AsyncSession

from labeling.database import Database, now
from labeling.errors import InvalidInput
from service.transfer.own_rows import VERSION, exported_columns, exported_tables, table_of

ROWS_PER_PAGE = 500


class UnknownTable(InvalidInput):
    code = "unknown_table"


def chosen(tables: Sequence[str]) -> list[str]:
    """In the order in which they can be imported; none named means all."""
    known = exported_tables()
    for name in tables:
        if name not in known:
            raise UnknownTable(f"no table {name!r} in an export", hint=f"Tables: {', '.join(known)}.")
    return [name for name in known if not tables or name in tables]


async def exported(database: Database, tables: Sequence[str], project: str | None) -> AsyncIterator[bytes]:
    """Chunks of whole lines. `project` None: of all."""
    encode = msgspec.json.Encoder().encode
    counts: Counter[str] = Counter()
    async with _snapshot(database) as session:
        yield encode({"nightschool_export": VERSION, "at": now(), "project": project}) + b"\n"
        for name in tables:
            async for page in _pages(session, table_of(exported_tables()[name]), project):
                counts[name] += len(page)
                yield b"".join(encode({"table": name, "row": row}) + b"\n" for row in page)
        yield encode({"end": {name: counts[name] for name in tables}}) + b"\n"


@asynccontextmanager
async def _snapshot(database: Database) -> AsyncIterator[AsyncSession]:
    async with database.read() as session:
        if database.is_sqlite:
            await session.execute(text("BEGIN"))
        else:
            await session.connection(execution_options={"isolation_level": "REPEATABLE READ"})
        yield session


async def _pages(session: AsyncSession, table: Table, project: str | None) -> AsyncIterator[list[dict[str, Any]]]:
    keys, columns = list(table.primary_key.columns), exported_columns(table)
    names = [str(column.name) for column in columns]
    rows = select(*columns).order_by(*keys).limit(ROWS_PER_PAGE)
    if project is not None and (mine := _of_project(table, project)) is not None:
        rows = rows.where(mine)
    after: tuple[Any, ...] | None = None
    while True:
        further = rows if after is None else rows.where(tuple_(*keys) > tuple_(*after))
        page = [dict(zip(names, row, strict=True)) for row in (await session.execute(further)).all()]
        if page:
            yield page
        if len(page) < ROWS_PER_PAGE:
            return
        after = tuple(page[-1][key.name] for key in keys)


def _of_project(table: Table, project: str) -> ColumnElement[bool] | None:
    """By its own column, or by that of a row that it belongs to; None where a table has to do with no project."""
    if "project" in table.columns:
        return table.columns["project"] == project
    for key in sorted(table.foreign_keys, key=lambda key: key.parent.nullable or False):
        inside = _of_project(key.column.table, project)
        if inside is not None:
            return key.parent.in_(select(key.column).where(inside))
    return None
