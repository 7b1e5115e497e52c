"""Many rows of one table in few statements, past the ORM: for the paths that every request takes.

`INSERT ... ON CONFLICT DO NOTHING`, in the order of the primary key, so that processes that insert the same keys at the
same time wait for each other and never in a circle. On PostgreSQL one `INSERT ... SELECT FROM unnest(...)`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from operator import attrgetter
from typing import Any

from sqlalchemy import Dialect, Table
from sqlalchemy.ext.asyncio import AsyncSession
from sqlmodel import SQLModel

MOST_PARAMETERS = 900  # SQLite's limit is 999 in the oldest builds
ROWS_AT_ONCE = 5_000  # bounds what PostgreSQL gets in one message
Bind = Callable[[Any], Any]


class BulkInsert:
    """Gives `returning`'s columns of the rows that were new; empty where none are asked for."""

    def __init__(self, model: type[SQLModel], returning: Sequence[str] = ()) -> None:
        self.table: Table = model.__table__  # type: ignore[attr-defined]  # every table=True model has one
        self._names = [column.name for column in self.table.columns]
        self._key = attrgetter(*(column.name for column in self.table.primary_key))
        self._returning = f" RETURNING {', '.join(returning)}" if returning else ""
        self._binds: dict[str, list[Bind | None]] = {}

    async def __call__(self, session: AsyncSession, rows: Sequence[SQLModel]) -> list[tuple[Any, ...]]:
        if not rows:
            return []
        dialect = session.get_bind().dialect
        values = list(self.values(sorted(rows, key=self._key), dialect))
        run = self._postgresql if dialect.name == "postgresql" else self._sqlite
        return await run(session, values, dialect)

    def values(self, rows: Sequence[SQLModel], dialect: Dialect) -> Iterator[tuple[Any, ...]]:
        """As the driver takes them: each column's own type prepares its value."""
        if dialect.name not in self._binds:
            types = [column.type.dialect_impl(dialect) for column in self.table.columns]
            self._binds[dialect.name] = [kind.bind_processor(dialect) for kind in types]
        columns = list(zip(self._names, self._binds[dialect.name], strict=True))
        for row in rows:
            held = row.__dict__
            yield tuple(bind(held[name]) if bind else held[name] for name, bind in columns)

    async def _sqlite(self, session: AsyncSession, values: list[tuple[Any, ...]], _: Dialect) -> list[tuple[Any, ...]]:
        connection = await session.connection()
        one = f"({', '.join('?' * len(self._names))})"
        if not self._returning:
            await connection.exec_driver_sql(self.statement(f"VALUES {one}"), values)
            return []
        found: list[tuple[Any, ...]] = []
        step = MOST_PARAMETERS // len(self._names)
        for start in range(0, len(values), step):
            part = values[start : start + step]
            statement = self.statement(f"VALUES {', '.join([one] * len(part))}")
            result = await connection.exec_driver_sql(statement, tuple(item for row in part for item in row))
            found += map(tuple, result.all())
        return found

    async def _postgresql(
        self, session: AsyncSession, values: list[tuple[Any, ...]], dialect: Dialect
    ) -> list[tuple[Any, ...]]:
        connection = await session.connection()
        kinds = [column.type.compile(dialect) for column in self.table.columns]
        arrays = ", ".join(f"${number}::{kind}[]" for number, kind in enumerate(kinds, 1))
        statement = self.statement(f"SELECT * FROM unnest({arrays})")  # noqa: S608 - names of our own table
        found: list[tuple[Any, ...]] = []
        for start in range(0, len(values), ROWS_AT_ONCE):
            columns = tuple(map(list, zip(*values[start : start + ROWS_AT_ONCE], strict=True)))
            result = await connection.exec_driver_sql(statement, columns)
            found += map(tuple, result.all()) if self._returning else ()
        return found

    def statement(self, source: str) -> str:
        names = ", ".join(f'"{name}"' for name in self._names)
        return f'INSERT INTO "{self.table.name}" ({names}) {source} ON CONFLICT DO NOTHING{self._returning}'
