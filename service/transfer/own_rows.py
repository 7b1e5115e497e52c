"""Our own export's lines: {"table", "row"}, every column under its name. What is exported, and what comes back in.

The tables of `labeling` come back. Nights, adapters and promotions are in an export for the record: they belong to the
installation that has the adapters' files and the MLflow versions.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from datetime import date, datetime
from functools import partial
from typing import Any

from pydantic import TypeAdapter, ValidationError
from sqlalchemy import JSON, BigInteger, Boolean, Column, Date, Enum, Float, Integer, String, Table
from sqlmodel import SQLModel

import labeling.tables
from labeling.database import UtcDateTime
from labeling.reporters import PREFIX
from loop.tables import Adapter, Evidence, LabelUse, Night, NightEvent, Promotion
from service.transfer.reading import LineRefused, Options, Row, name, when

VERSION = 1
# What an installation finds out about itself (which server's project holds its tasks, how far it has read and looked,
# what it counted today), and the secret that reporters are hashed with.
STAYS = frozenset(
    {
        "labelling_projects",
        "exchange_retention",
        "fold_progress",
        "entry_counts",
        "entry_progress",
        "reporter_salts",
    }
)
FOR_THE_RECORD = (Night, NightEvent, LabelUse, Adapter, Evidence, Promotion)


def _tables_of(models: Any) -> dict[str, type[SQLModel]]:
    found = {str(model.__tablename__): model for model in models}
    order = [str(table.name) for table in SQLModel.metadata.sorted_tables]
    return {table: found[table] for table in order if table in found}


def imported_tables() -> dict[str, type[SQLModel]]:
    """By name, what others refer to first."""
    models = [model for _, model in inspect.getmembers(labeling.tables, inspect.isclass) if hasattr(model, "__table__")]
    return {table: model for table, model in _tables_of(models).items() if table not in STAYS}


def exported_tables() -> dict[str, type[SQLModel]]:
    return imported_tables() | _tables_of(FOR_THE_RECORD)


def exported_columns(table: Table) -> list[Column[Any]]:
    return [column for column in table.columns if not column.info.get(labeling.tables.OURS_ALONE)]


def table_of(model: type[SQLModel] | SQLModel) -> Table:
    table = getattr(model, "__table__")  # noqa: B009  # SQLModel does not declare it
    assert isinstance(table, Table)
    return table


def fits(row: Row) -> bool:
    return row.keys() == {"table", "row"} or bool({"nightschool_export", "end"} & row.keys())


def read(row: Row, options: Options) -> list[SQLModel]:
    """[]: first and last line, and what is there for the record."""
    if "table" not in row:
        if row.get("nightschool_export", VERSION) != VERSION:
            raise LineRefused(f"an export of form {row['nightschool_export']!r}; this release reads form {VERSION}")
        return []
    table, given = name(row["table"], "table"), row["row"]
    if table in exported_tables() and table not in imported_tables():
        return []
    model = imported_tables().get(table or "")
    if model is None or not isinstance(given, dict):
        raise LineRefused(f"no table {table!r} that can be imported")
    return [row_of(model, given, options)]


def row_of(model: type[SQLModel], given: Row, options: Options) -> SQLModel:
    columns = {column.name: column for column in table_of(model).columns}
    if unknown := sorted(given.keys() - columns.keys()):
        raise LineRefused(f"{model.__tablename__} has no column {', '.join(unknown)}: of a later release?")
    kept = {column.name for column in exported_columns(table_of(model))}
    values = {key: _value(model, columns[key], value) for key, value in given.items() if key in kept}
    missing = [key for key, known in model.model_fields.items() if known.is_required() and key not in values]
    if missing:
        raise LineRefused(f"{model.__tablename__}: {', '.join(missing)} is missing")
    if options.into and "project" in columns:
        values["project"] = options.into
    reporter = values.get("reporter")
    if isinstance(reporter, str) and not reporter.startswith(PREFIX):  # written by hand: an export has none in plain
        values["reporter"] = options.reporters.pseudonym(values["project"], reporter)
    return model(**values)


def _value(model: type[SQLModel], column: Column[Any], value: Any) -> Any:
    if isinstance(column.type, JSON):
        return _json_of(model, column.name, value)
    if value is None:
        if not column.nullable:
            raise LineRefused(f"{column.name} is null")
        return None
    fitting = _fitting(column, value)
    if fitting is None:
        raise LineRefused(f"{column.name}: {str(value)[:80]!r} does not fit")
    return fitting


def _json_of(model: type[SQLModel], name: str, value: Any) -> Any:
    """As the model declares it: a list of texts, a map, messages."""
    try:
        return TypeAdapter[Any](model.model_fields[name].annotation or Any).validate_python(value, strict=True)
    except ValidationError as error:
        raise LineRefused(f"{name}: {error.errors()[0]['msg']}") from None


def _fitting(column: Column[Any], value: Any) -> Any:
    """None: it does not fit."""
    if isinstance(column.type, Enum):
        return next((member for member in column.type.enum_class or () if member.value == value), None)
    kind, taken, into = next((one for one in _KINDS if isinstance(column.type, one[0])), (None, object, _same))
    if not isinstance(value, taken) or (isinstance(value, bool) and kind is not Boolean):
        return None
    return into(value)


def _same(value: Any) -> Any:
    return value


def _within(value: int, bits: int) -> int | None:
    """As PostgreSQL's integers are wide."""
    return value if -(2 ** (bits - 1)) <= value < 2 ** (bits - 1) else None


_KINDS: tuple[tuple[Any, Any, Callable[[Any], Any]], ...] = (
    (UtcDateTime, str | datetime, when),
    (Date, str, date.fromisoformat),
    (Boolean, bool, bool),
    (BigInteger, int, partial(_within, bits=64)),
    (Integer, int, partial(_within, bits=32)),
    (Float, int | float, float),
    (String, str, _same),
)
