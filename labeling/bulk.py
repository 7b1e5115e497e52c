"""Many rows of one table in few statements, past the ORM: for the paths that every request takes.

`INSERT ... ON CONFLICT DO NOTHING`, in the order of the primary key, so that processes that insert the same keys at the
same time wait for each other and never in a circle. On PostgreSQL one `INSERT ... SELECT FROM unnest(...)`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from operator import attrgetter
from typing import Any

from sqlalchemy import Connection, Dialect, Table
from sqlmodel import SQLModel

MOST_PARAMETERS = 30_000  # SQLite's limit is 32,766
ROWS_AT_ONCE = 5_000  # bounds what PostgreSQL gets in one message
Bind = Callable[[Any], Any]


class BulkInsert:
    """Gives `returning`'s columns of the rows that were new; empty where none are asked for.

    A row is any object with attributes named as columns; a column that it lacks gets the model's default.
    """

    def __init__(self, model: type[SQLModel], returning: Sequence[str] = ()) -> None:
        self.table: Table = model.__table__  # type: ignore[attr-defined]  # every table=True model has one
        self._names = [column.name for column in self.table.columns]
        self._defaults = {name: field.default for name, field in model.model_fields.items()}
        self._key = attrgetter(*(column.name for column in self.table.primary_key))
        self._returning = f" RETURNING {', '.join(returning)}" if returning else ""
        self._binds: dict[str, list[Bind | None]] = {}

    def __call__(self, connection: Connection, rows: Sequence[object]) -> list[tuple[Any, ...]]:
        dialect = connection.dialect
        values = list(self.values(sorted(rows, key=self._key), dialect))
        found: list[tuple[Any, ...]] = []
        statements = self._unnested if dialect.name == "postgresql" else self._listed
        for statement, parameters in statements(values, dialect):
            result = connection.exec_driver_sql(statement, parameters)
            found += map(tuple, result.all()) if self._returning else ()
        return found

    def values(self, rows: Sequence[object], dialect: Dialect) -> Iterator[tuple[Any, ...]]:
        """As the driver takes them: each column's own type prepares its value."""
        if dialect.name not in self._binds:
            types = [column.type.dialect_impl(dialect) for column in self.table.columns]
            self._binds[dialect.name] = [kind.bind_processor(dialect) for kind in types]
        columns = list(zip(self._names, self._binds[dialect.name], strict=True))
        for row in rows:
            held = {**self._defaults, **row.__dict__}
            yield tuple(bind(held[name]) if bind else held[name] for name, bind in columns)

    def statement(self, source: str) -> str:
        names = ", ".join(f'"{name}"' for name in self._names)
        return f'INSERT INTO "{self.table.name}" ({names}) {source} ON CONFLICT DO NOTHING{self._returning}'

    def _listed(self, values: list[tuple[Any, ...]], _: Dialect) -> Iterator[tuple[str, tuple[Any, ...]]]:
        """One statement for all: between two, the thread would wait for the interpreter's lock."""
        one = f"({', '.join('?' * len(self._names))})"
        step = MOST_PARAMETERS // len(self._names)
        for start in range(0, len(values), step):
            part = values[start : start + step]
            statement = self.statement(f"VALUES {', '.join([one] * len(part))}")
            yield statement, tuple(item for row in part for item in row)

    def _unnested(self, values: list[tuple[Any, ...]], dialect: Dialect) -> Iterator[tuple[str, tuple[Any, ...]]]:
        kinds = [column.type.compile(dialect) for column in self.table.columns]
        arrays = ", ".join(f"${number}::{kind}[]" for number, kind in enumerate(kinds, 1))
        statement = self.statement(f"SELECT * FROM unnest({arrays})")  # noqa: S608 - names of our own table
        for start in range(0, len(values), ROWS_AT_ONCE):
            yield statement, tuple(map(list, zip(*values[start : start + ROWS_AT_ONCE], strict=True)))
