"""`nightschool import`: files in batches to the installation, with progress, and every refused line by number."""

from __future__ import annotations

import asyncio
import json
import re
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from labeling.errors import InvalidInput
from service.commands.export import with_pyarrow
from service.commands.local_api import Answered, Api, NoProcess, with_api
from service.transfer.own_rows import imported_tables
from service.transfer.position import Bookmark, Position
from service.transfer.sources import Batch, JsonLines, Source, UnreadableFile

BATCH_LINES = 1000
BATCH_BYTES = 1_000_000
PARQUET = b"PAR1"
PAUSES = (1.0, 2.0, 5.0, 10.0, 30.0)  # before a batch is sent again to a service or a database that does not answer


class SomeRefused(InvalidInput):
    code = "some_lines_refused"
    default_hint = "Mend those lines and import the file again: what is stored already is recognised."


@dataclass(frozen=True)
class Way:
    """How lines are read: the query of each request."""

    project: str | None
    form: str | None
    scale: tuple[str, ...]
    skip: tuple[str, ...]
    dry_run: bool

    def params(self, first_line: int) -> dict[str, Any]:
        given = {"project": self.project, "format": self.form, "scale": self.scale, "skip": self.skip}
        kept = {key: value for key, value in given.items() if value}
        return {**kept, "first_line": first_line, "dry_run": str(self.dry_run).lower()}


def import_files(
    path: Path,
    files: Sequence[Path],
    *,
    project: str | None,
    form: str | None,
    scale: Sequence[str],
    skip: Sequence[str],
    refused: Path | None,
    dry_run: bool,
    restart: bool,
    as_json: bool,
) -> None:
    async def body(api: Api) -> None:
        if project is None and form not in (None, "nightschool"):
            api.project(None)  # said before the first line is read
        way = Way(project, form, tuple(scale), tuple(skip), dry_run)
        sources = [source for file in files for source in _sources(file)]
        totals = Position()
        for source in sources:
            mine = _report_of(refused, source, sources)
            position = await _Import(api, way, source, mine, restart).run()
            totals.stored += position.stored
            totals.duplicates += position.duplicates
            totals.left_out += position.left_out
            totals.refused += position.refused
        _say(totals, dry_run=dry_run, as_json=as_json)
        if totals.refused:
            raise SomeRefused(f"{totals.refused} line(s) were refused")

    with_api(path, body, streams=True)


def _sources(file: Path) -> list[Source]:
    """A folder is an export as Parquet; its tables come in the order in which they refer to each other."""
    if file.is_dir():
        order = list(imported_tables())
        tables = [table for path in sorted(file.glob("*.parquet")) for table in _sources(path)]
        if not tables:
            raise UnreadableFile(f"{file} has no Parquet file in it", hint="Name files of JSON lines one by one.")
        return sorted(
            (table for table in tables if getattr(table, "table", "") in order),
            key=lambda table: order.index(getattr(table, "table")),  # noqa: B009  # of Parquet files alone
        )
    if not file.is_file():
        raise UnreadableFile(f"{file} is no file")
    with file.open("rb") as start:
        if start.read(4) != PARQUET:
            return [JsonLines(file)]
    source: Source = with_pyarrow().ParquetRows(file)
    return [source]


def _report_of(refused: Path | None, source: Source, sources: Sequence[Source]) -> Path | None:
    """One file of refused lines for each file that is imported."""
    if refused is None or len(sources) == 1:
        return refused
    return refused.with_name(f"{refused.stem}-{source.path.stem}{refused.suffix}")


class _Import:
    """One file. After each batch that is stored: the refused lines, then the position."""

    def __init__(self, api: Api, way: Way, source: Source, report: Path | None, restart: bool) -> None:
        self._api, self._way, self._source, self._report = api, way, source, report
        self._bookmark = Bookmark(api.settings.data_dir.resolve(), source.path, (way, str(report)))
        if restart or way.dry_run:
            self._bookmark.forget()
        self._position = self._bookmark.read()
        if self._position.line > 1:
            print(f"{source.path}: goes on at line {self._position.line}", file=sys.stderr)
        if report is not None:
            _cut(report, self._position.report_bytes)

    async def run(self) -> Position:
        longest = self._api.settings.http.max_body_bytes
        start = (self._position.line, self._position.offset)
        with _progress(self._source.path) as advance:
            for batch in self._source.batches(start, BATCH_LINES, min(BATCH_BYTES, longest), longest):
                for part in _fitting(batch, longest):
                    answer = await self._send(part)
                    self._position.add(answer)
                    self._tell(batch, answer["refused"])
                self._position.line, self._position.offset = batch.line, batch.offset
                if not self._way.dry_run:
                    self._bookmark.write(self._position)
                advance(batch.read)
        self._bookmark.forget()
        return self._position

    async def _send(self, batch: Batch) -> dict[str, Any]:
        answer = await self._sent(batch)
        reason = "longer than http.max_body_bytes"
        answer["refused"] += [{"line": line, "reason": reason} for line in batch.too_long]
        return answer

    async def _sent(self, batch: Batch) -> dict[str, Any]:
        """Sent again while nobody answers: a batch that was stored after all is recognised."""
        for pause in (*PAUSES, None):
            try:
                return dict(await self._api.send("/v1/import", batch.body, self._way.params(batch.first_line)))
            except (NoProcess, Answered) as error:
                if pause is None or not (isinstance(error, NoProcess) or error.again):
                    raise
            await asyncio.sleep(pause)
        raise AssertionError

    def _tell(self, batch: Batch, refused: list[dict[str, Any]]) -> None:
        if not refused:
            return
        if self._report is None:
            for one in refused:
                print(f"{self._source.path}:{one['line']}: {one['reason']}", file=sys.stderr)
            return
        lines = batch.body.split(b"\n")
        with self._report.open("ab") as file:
            for one in refused:
                text = lines[one["line"] - batch.first_line].decode("utf-8", "replace")
                file.write(json.dumps({**one, "text": text}, ensure_ascii=False).encode() + b"\n")
            self._position.report_bytes = file.tell()


def _cut(report: Path, size: int) -> None:
    """Whatever was written after the last stored batch comes again."""
    try:
        report.touch()
        with report.open("r+b") as file:
            file.truncate(size)
    except OSError as error:
        raise UnreadableFile(f"cannot write {report}: {error.strerror}") from None


def _fitting(batch: Batch, longest: int) -> Iterator[Batch]:
    """One batch, or, where it is more than a request may hold, each of its halves."""
    lines = re.findall(rb"[^\n]*\n|[^\n]+", batch.body)  # splitlines() ends lines at a bare \r, too
    if len(batch.body) <= longest or len(lines) == 1:
        yield batch
        return
    middle = len(lines) // 2
    parts = ((batch.first_line, lines[:middle]), (batch.first_line + middle, lines[middle:]))
    for first, part in parts:
        long = tuple(line for line in batch.too_long if first <= line < first + len(part))
        yield from _fitting(Batch(first, b"".join(part), batch.line, batch.offset, long, batch.read), longest)


@contextmanager
def _progress(path: Path) -> Iterator[Any]:
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task(escape(path.name), total=path.stat().st_size)
        yield lambda done: progress.update(task, completed=done)


def _say(totals: Position, *, dry_run: bool, as_json: bool) -> None:
    if as_json:
        counts = {"stored": totals.stored, "duplicates": totals.duplicates}
        print(json.dumps({**counts, "left_out": totals.left_out, "refused": totals.refused, "dry_run": dry_run}))
        return
    table = Table("table", "would be stored" if dry_run else "stored", "there already")
    for name in sorted(totals.stored.keys() | totals.duplicates.keys()):
        table.add_row(name, str(totals.stored[name]), str(totals.duplicates[name]))
    Console().print(table)
    print(f"Left out: {totals.left_out} line(s). Refused: {totals.refused}.")
