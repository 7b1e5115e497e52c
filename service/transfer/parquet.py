"""An export as Parquet: a folder with a file for each table, columns typed, JSON as text.

The only module that imports pyarrow, which is an extra; it is imported when somebody asks for Parquet.
"""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Iterator
from datetime import date, datetime
from pathlib import Path
from typing import Any

import msgspec
import pyarrow as pa
import pyarrow.parquet as pq
from sqlalchemy import JSON, Boolean, Column, Date, Float, Integer

from labeling.database import UtcDateTime
from service.transfer.own_rows import exported_columns, exported_tables, table_of
from service.transfer.sources import Batch, UnreadableFile

ROWS_PER_GROUP = 2000
MARK = b"nightschool_table"


async def write(lines: AsyncIterator[bytes], folder: Path) -> dict[str, int]:
    """The tables of an export's lines; gives the last line's counts, or nothing where there was none."""
    folder.mkdir(parents=True)
    open_file: _TableFile | None = None
    counts: dict[str, int] = {}
    try:
        async for line in lines:
            found = msgspec.json.decode(line)
            if "table" not in found:
                counts = found.get("end", counts)
                continue
            if open_file is None or open_file.table != found["table"]:
                if open_file is not None:
                    open_file.close()
                open_file = _TableFile(folder, found["table"])
            open_file.add(found["row"])
    finally:
        if open_file is not None:
            open_file.close()
    (folder / "export.json").write_text(json.dumps({"rows": counts}, indent=1) + "\n", encoding="utf-8")
    return counts


class _TableFile:
    def __init__(self, folder: Path, table: str) -> None:
        self.table = table
        self._columns = {column.name: column for column in exported_columns(table_of(exported_tables()[table]))}
        fields = [pa.field(name, _kind(column), nullable=True) for name, column in self._columns.items()]
        self._schema = pa.schema(fields, metadata={MARK: table.encode()})
        self._writer = pq.ParquetWriter(folder / f"{table}.parquet", self._schema, compression="zstd")
        self._rows: list[dict[str, Any]] = []

    def add(self, row: dict[str, Any]) -> None:
        self._rows.append({name: _out(self._columns[name], value) for name, value in row.items()})
        if len(self._rows) == ROWS_PER_GROUP:
            self._flush()

    def close(self) -> None:
        self._flush()
        self._writer.close()

    def _flush(self) -> None:
        if self._rows:
            self._writer.write_table(pa.Table.from_pylist(self._rows, schema=self._schema))
            self._rows = []


def _kind(column: Column[Any]) -> Any:
    match column.type:
        case UtcDateTime():
            return pa.timestamp("us", tz="UTC")
        case Date():
            return pa.date32()
        case Boolean():
            return pa.bool_()
        case Integer():
            return pa.int64()
        case Float():
            return pa.float64()
    return pa.string()


def _out(column: Column[Any], value: Any) -> Any:
    if isinstance(column.type, JSON):
        return msgspec.json.encode(value).decode()
    if value is not None and isinstance(column.type, UtcDateTime):
        return datetime.fromisoformat(value)
    if value is not None and isinstance(column.type, Date):
        return date.fromisoformat(value)
    return value


class ParquetRows:
    """One table's file of such an export, as the lines that it came from; `line` counts its rows."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._file = pq.ParquetFile(path)
        except (OSError, pa.ArrowException) as error:
            raise UnreadableFile(f"cannot read {path}: {error}") from None
        mark = (self._file.schema_arrow.metadata or {}).get(MARK, b"").decode()
        if mark not in exported_tables():
            raise UnreadableFile(f"{path} is no table of an export", hint="Other data come in as JSON lines.")
        self.table = mark

    def batches(self, start: tuple[int, int], lines: int, size: int, longest: int) -> Iterator[Batch]:
        columns = {column.name: column for column in exported_columns(table_of(exported_tables()[self.table]))}
        texts = {name for name, column in columns.items() if isinstance(column.type, JSON)}
        first = number = start[0]
        seen, held = 0, 0
        taken: list[bytes] = []
        too_long: list[int] = []
        total, all_bytes = max(self._file.metadata.num_rows, 1), self.path.stat().st_size
        for group in self._file.iter_batches(batch_size=min(lines, ROWS_PER_GROUP)):
            if seen + group.num_rows < first:
                seen += group.num_rows
                continue
            for row in group.to_pylist():
                seen += 1
                if seen < first:
                    continue
                line = self._line(row, texts)
                if len(line) > longest:
                    too_long.append(number)
                    line = b"\n"
                taken.append(line)
                held += len(line)
                number += 1
                if len(taken) == lines or held >= size:
                    yield Batch(first, b"".join(taken), number, 0, tuple(too_long), all_bytes * seen // total)
                    first, taken, held, too_long = number, [], 0, []
        if taken:
            yield Batch(first, b"".join(taken), number, 0, tuple(too_long), all_bytes)

    def _line(self, row: dict[str, Any], texts: set[str]) -> bytes:
        """JSON texts are put in as they are: they need no second reading here."""
        given = {
            name: msgspec.Raw(value.encode()) if name in texts and value is not None else value
            for name, value in row.items()
        }
        return msgspec.json.encode({"table": self.table, "row": given}) + b"\n"
