"""Many rows of one table in few statements, past the ORM: for the paths that every request takes.

`INSERT ... ON CONFLICT DO NOTHING`, in the order of the primary key, so that processes that insert the same keys at the
same time wait for each other and never in a circle. On PostgreSQL one `INSERT ... SELECT FROM unnest(...)`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, repeat
from operator import attrgetter
from typing import Any

import msgspec
from sqlalchemy import JSON, Column, Connection, Dialect, Table
from sqlmodel import SQLModel

MOST_PARAMETERS = 30_000  # SQLite's limit is 32,766
ROWS_AT_ONCE = 5_000  # bounds what PostgreSQL gets in one message
Bind = Callable[[Any], Any]


@dataclass(frozen=True)
class _Place:
    """A column that is filled: its name, its type in SQL, and what prepares a value for the driver."""

    name: str
    kind: str
    bind: Bind | None


@dataclass(frozen=True)
class _Column:
    """Its values in a batch, as the driver takes them: all, or, where they do not `differ`, the one."""

    place: _Place
    held: Any
    differ: bool


class BulkInsert:
    """Gives `returning`'s columns of the rows that were new; empty where none are asked for.

    Rows are objects of one class with attributes named as columns; columns that it lacks get the model's default.
    """

    def __init__(self, model: type[SQLModel], returning: Sequence[str] = ()) -> None:
        self.table: Table = model.__table__  # type: ignore[attr-defined]  # every table=True model has one
        self._defaults = {name: field.default for name, field in model.model_fields.items()}
        self._key = attrgetter(*(column.name for column in self.table.primary_key))
        self._returning = f" RETURNING {', '.join(returning)}" if returning else ""
        self._plans: dict[tuple[str, type], list[_Place]] = {}

    def __call__(self, connection: Connection, rows: Sequence[object]) -> list[tuple[Any, ...]]:
        if not rows:
            return []
        places = self.places(rows[0], connection.dialect)
        ordered = sorted(rows, key=self._key)
        found: list[tuple[Any, ...]] = []
        statements = self._unnested if connection.dialect.name == "postgresql" else self._listed
        for statement, parameters in statements(ordered, places):
            result = connection.exec_driver_sql(statement, parameters)
            found += map(tuple, result.all()) if self._returning else ()
        return found

    def places(self, row: object, dialect: Dialect) -> list[_Place]:
        """The columns to fill from rows of this class."""
        known = (dialect.name, type(row))
        if known not in self._plans:
            given = [c for c in self.table.columns if c.name in vars(row) or self._defaults[c.name] is not None]
            self._plans[known] = [_place(column, dialect) for column in given]
        return self._plans[known]

    def values(self, rows: Sequence[object], places: Sequence[_Place]) -> Iterator[tuple[Any, ...]]:
        """As the driver takes them."""
        columns = (self._column(rows, place) for place in places)
        return zip(*(one.held if one.differ else repeat(one.held, len(rows)) for one in columns), strict=True)

    def _column(self, rows: Sequence[object], place: _Place) -> _Column:
        if place.name in vars(rows[0]):
            held = list(map(attrgetter(place.name), rows))
            if held.count(None) == len(held):
                held = [None]
        else:
            held = [self._defaults[place.name]]
        if place.bind is not None:  # before they are compared: to Python, 1, 1.0 and True in a JSON are the same
            held = list(map(place.bind, held))
        differ = held.count(held[0]) < len(held)
        return _Column(place, held if differ else held[0], differ)

    def statement(self, places: Sequence[_Place], source: str) -> str:
        names = ", ".join(f'"{place.name}"' for place in places)
        return f'INSERT INTO "{self.table.name}" ({names}) {source} ON CONFLICT DO NOTHING{self._returning}'

    def _listed(self, rows: list[object], places: Sequence[_Place]) -> Iterator[tuple[str, tuple[Any, ...]]]:
        """One statement for all: between two, the thread would wait for the interpreter's lock."""
        one = f"({', '.join('?' * len(places))})"
        step = MOST_PARAMETERS // len(places)
        for start in range(0, len(rows), step):
            part = rows[start : start + step]
            statement = self.statement(places, f"VALUES {', '.join([one] * len(part))}")
            yield statement, tuple(chain.from_iterable(self.values(part, places)))

    def _unnested(self, rows: list[object], places: Sequence[_Place]) -> Iterator[tuple[str, tuple[Any, ...]]]:
        """What all rows have in common is sent once: the driver looks at each item of an array for a long time."""
        for start in range(0, len(rows), ROWS_AT_ONCE):
            part = rows[start : start + ROWS_AT_ONCE]
            columns = list(enumerate((self._column(part, place) for place in places), 1))
            arrays = ", ".join(f"${number}::{one.place.kind}[]" for number, one in columns if one.differ)
            names = ", ".join(f'"{one.place.name}"' for _, one in columns if one.differ)
            chosen = ", ".join(
                f'"{one.place.name}"' if one.differ else f"${number}::{one.place.kind}" for number, one in columns
            )
            given = f" FROM unnest({arrays}) AS given({names})" if arrays else ""
            source = f"SELECT {chosen}{given}"
            yield self.statement(places, source), tuple(one.held for _, one in columns)


def _place(column: Column[Any], dialect: Dialect) -> _Place:
    """Each column's own type prepares its value; JSON is spelled by the quicker encoder."""
    if isinstance(column.type, JSON):
        bind: Bind | None = _as_json
    else:
        bind = column.type.dialect_impl(dialect).bind_processor(dialect)
    return _Place(column.name, column.type.compile(dialect), bind)


def _as_json(value: Any) -> str:
    return msgspec.json.encode(value).decode()
