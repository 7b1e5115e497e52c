"""`nightschool import`, `export` and `feedback unlinked` on a data folder: nothing runs, or a process serves it."""

from __future__ import annotations

import asyncio
import gzip
import json
import os
import random
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from labeling.database import Database
from labeling.tables import Exchange, Feedback
from service.commands import export, feedback, transfer
from service.commands.local_api import open_api
from service.settings import load
from service.transfer.position import Bookmark, Position
from service.transfer.sources import JsonLines, UnreadableFile
from tests.running import count
from tests.unit.test_transfer_formats import LOGGED, SCORE

ROOT = Path(__file__).parents[2]
SETTINGS = """
data_dir = "data"
{database}
[http]
max_body_bytes = {longest}
[vllm]
managed = false
[[vllm.replicas]]
url = "http://127.0.0.1:9"
[label_studio]
managed = false
[mlflow]
managed = false
url = "http://127.0.0.1:9"
[[projects]]
name = "support-bot"
base_dir = "base"
base_name = "base"
"""


@pytest.fixture
def installed(tmp_path: Path, database_url: str) -> Path:
    path = tmp_path / "nightschool.toml"
    url = "" if database_url.startswith("sqlite") else f'[database]\nurl = "{database_url}"'
    path.write_text(SETTINGS.format(database=url, longest=20_000), encoding="utf-8")
    return path


def pairs(count: int, start: int = 0) -> list[dict[str, Any]]:
    return [
        {**LOGGED, "response": {**LOGGED["response"], "id": f"chatcmpl-{number}"}}
        for number in range(start, start + count)
    ]


def written(path: Path, lines: list[Any]) -> Path:
    body = b"".join((line if isinstance(line, bytes) else json.dumps(line).encode()) + b"\n" for line in lines)
    path.write_bytes(gzip.compress(body) if path.suffix == ".gz" else body)
    return path


def run_import(settings: Path, *files: Path, **options: Any) -> None:
    known: dict[str, Any] = {"project": None, "form": None, "scale": [], "skip": [], "refused": None}
    transfer.import_files(settings, files, **{**known, "dry_run": False, "restart": False, "as_json": True, **options})


def stored(settings: Path, *tables: type[Any]) -> list[int]:
    async def look() -> list[int]:
        database = Database(load(settings).database_url)
        try:
            return [await count(database, table) for table in tables]
        finally:
            await database.close()

    return asyncio.run(look())


def test_a_file_comes_in_whole(installed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Plain or gzip, in many batches; each refused line by its number; what is known is counted, and stored once."""
    lines: list[Any] = [*pairs(2500), b"{", SCORE, {"a": 1}, b"x" * 30_000, *pairs(10)]
    refused = tmp_path / "refused.jsonl"
    with pytest.raises(transfer.SomeRefused, match="3 line"):
        run_import(installed, written(tmp_path / "a.jsonl", lines), refused=refused)
    assert json.loads(capsys.readouterr().out) == {
        "stored": {"exchanges": 2500, "feedback": 1},
        "duplicates": {"exchanges": 10},
        "left_out": 0,
        "refused": 3,
        "dry_run": False,
    }
    told = [json.loads(line) for line in refused.read_text(encoding="utf-8").splitlines()]
    assert {one["line"]: one["text"] for one in told} == {2501: "{", 2503: '{"a": 1}', 2504: ""}
    assert "max_body_bytes" in next(one["reason"] for one in told if one["line"] == 2504)
    with pytest.raises(transfer.SomeRefused):
        run_import(installed, written(tmp_path / "b.jsonl.gz", lines))
    captured = capsys.readouterr()
    assert json.loads(captured.out)["stored"] == {}
    assert "b.jsonl.gz:2501: not JSON" in captured.err
    assert stored(installed, Exchange, Feedback) == [2500, 1]


def test_a_dry_run_stores_nothing(installed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run_import(installed, written(tmp_path / "a.jsonl", pairs(5)), dry_run=True)
    assert json.loads(capsys.readouterr().out)["stored"] == {"exchanges": 5}
    assert stored(installed, Exchange) == [0]


def test_broken_off_it_goes_on(
    installed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """At the line after the last stored batch: no batch is sent again, the counts and the refused lines are whole."""
    monkeypatch.setattr(transfer, "BATCH_LINES", 10)
    file = written(tmp_path / "a.jsonl.gz", [b"{", *pairs(99)])
    refused = tmp_path / "refused.jsonl"
    sent: list[int] = []
    send = transfer._Import._send

    async def breaking(self: Any, batch: Any) -> Any:
        sent.append(batch.first_line)
        if len(sent) == 5:
            refused.write_bytes(refused.read_bytes() + b"half a li")
            raise KeyboardInterrupt
        return await send(self, batch)

    monkeypatch.setattr(transfer._Import, "_send", breaking)
    with pytest.raises(KeyboardInterrupt):
        run_import(installed, file, refused=refused)
    with pytest.raises(transfer.SomeRefused):
        run_import(installed, file, refused=refused)
    assert sent == [1, 11, 21, 31, 41, 41, 51, 61, 71, 81, 91]
    captured = capsys.readouterr()
    assert json.loads(captured.out)["stored"] == {"exchanges": 99}
    assert "goes on at line 41" in captured.err
    assert [json.loads(line)["line"] for line in refused.read_text(encoding="utf-8").splitlines()] == [1]
    assert not list((tmp_path / "data" / "state" / "imports").iterdir())


def test_killed_again_and_again(installed: Path, tmp_path: Path) -> None:
    """kill -9 at any moment, then once to the end: every row is there once."""
    file = written(tmp_path / "a.jsonl", pairs(6000))
    command = [sys.executable, "-m", "service.cli", "import", "-s", str(installed), str(file)]
    for _ in range(3):
        process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            process.wait(random.uniform(1.5, 4))
        except subprocess.TimeoutExpired:
            os.kill(process.pid, signal.SIGKILL)
            process.wait()
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert stored(installed, Exchange) == [6000]


async def test_a_process_that_serves_is_asked(installed: Path, tmp_path: Path) -> None:
    """While another has the folder, import and export go through its HTTP, and see the same rows."""
    settings = load(installed)
    if not settings.database_url.startswith("sqlite"):
        pytest.skip("the lock on the folder is the same")
    file, out = written(tmp_path / "a.jsonl", pairs(30)), tmp_path / "out.jsonl"
    async with open_api(settings, streams=True) as api:
        lock = tmp_path / "data" / "lock"
        lock.write_text(json.dumps({"pid": os.getpid(), "url": str(api.client.base_url)}), encoding="utf-8")
        await asyncio.to_thread(run_import, installed, file)
        await asyncio.to_thread(export.run, installed, out, project=None, tables=[], form="jsonl", force=False)
    assert len(out.read_text(encoding="utf-8").splitlines()) == 32


def test_out_and_in_again(installed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A packed export into another, empty installation; an export of that one has the same rows."""
    run_import(installed, written(tmp_path / "a.jsonl", [*pairs(50), SCORE]))
    first, second = tmp_path / "first.jsonl.gz", tmp_path / "second.jsonl"
    common: dict[str, Any] = {"project": None, "tables": [], "form": "jsonl"}
    export.run(installed, first, force=False, **common)
    other = tmp_path / "other" / "nightschool.toml"
    other.parent.mkdir()
    other.write_text(SETTINGS.format(database="", longest=4_000_000), encoding="utf-8")
    run_import(other, first)
    export.run(other, second, force=False, **common)
    lines = gzip.decompress(first.read_bytes()).splitlines()
    assert second.read_bytes().splitlines()[1:] == lines[1:]
    assert len(lines) == 53
    with pytest.raises(export.TargetExists):
        export.run(other, second, force=False, **common)
    export.run(other, second, force=True, **common)


def test_parquet_out_and_in_again(installed: Path, tmp_path: Path) -> None:
    """A folder of typed tables, read by any tool; back in, every row and time is the same."""
    run_import(installed, written(tmp_path / "a.jsonl", [*pairs(2300), SCORE]))
    folder, lines, second = tmp_path / "out", tmp_path / "a-out.jsonl", tmp_path / "b-out.jsonl"
    common: dict[str, Any] = {"project": None, "tables": [], "force": False}
    export.run(installed, folder, form="parquet", **common)
    export.run(installed, lines, form="jsonl", **common)
    table = pq.read_table(folder / "exchanges.parquet")
    assert table.num_rows == 2300
    assert str(table.schema.field("created_at").type) == "timestamp[us, tz=UTC]"
    other = tmp_path / "other" / "nightschool.toml"
    other.parent.mkdir()
    other.write_text(SETTINGS.format(database="", longest=4_000_000), encoding="utf-8")
    run_import(other, folder)
    export.run(other, second, form="jsonl", **common)
    assert second.read_bytes().splitlines()[1:] == lines.read_bytes().splitlines()[1:]


def test_without_pyarrow_parquet_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is an extra: the message says how to get it, before anything is started."""
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    monkeypatch.delitem(sys.modules, "service.transfer.parquet", raising=False)
    with pytest.raises(export.NoPyarrow) as caught:
        export.run(tmp_path / "none.toml", tmp_path / "x", project=None, tables=[], form="parquet", force=False)
    assert "nightschool[parquet]" in caught.value.hint


def test_half_an_export_is_none(tmp_path: Path) -> None:
    """The counts in the last line are what makes it whole."""
    with pytest.raises(export.ExportBrokeOff):
        export.counts_of(b'{"nightschool_export":1}\n{"table":"exchanges","row":{}}\n')
    assert export.counts_of(b'{"table":"x"}\n{"end":{"x":1}}\n') == {"x": 1}


def test_unlinked_feedback_is_listed(installed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    feedback.unlinked(installed, project=None, limit=5, as_json=False)
    assert "All feedback has its exchange" in capsys.readouterr().out
    run_import(installed, written(tmp_path / "a.jsonl", [SCORE]))
    capsys.readouterr()
    feedback.unlinked(installed, project=None, limit=5, as_json=True)
    found = json.loads(capsys.readouterr().out)
    assert (found["total"], found["feedback"][0]["named"]) == (1, {"request_id": "t1"})


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("size", [1, 30, 10_000])
def test_batches_are_whole_lines(tmp_path: Path, packed: bool, size: int) -> None:
    """From any batch's end on the rest comes the same; memory holds a batch, and a line that is too long no byte."""
    lines = [b"a" * (number % 40) for number in range(200)]
    lines[50] = b"b" * 100_000
    file = written(tmp_path / ("a.gz" if packed else "a"), lines)
    batches = list(JsonLines(file).batches((1, 0), 7, size, 64))
    assert b"".join(batch.body for batch in batches) == b"\n".join([*lines[:50], b"", *lines[51:], b""])
    assert [line for batch in batches for line in batch.too_long] == [51]
    for place, batch in enumerate(batches):
        rest = list(JsonLines(file).batches((batch.line, batch.offset), 7, size, 64))
        assert [part.body for part in rest] == [part.body for part in batches[place + 1 :]]
        assert len(batch.body) <= max(size, 7) + 64


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    """A broken gzip says so after what came before it; a missing file at once."""
    whole = gzip.compress(b'{"a": 1}\n' * 5000 + os.urandom(1000))
    (tmp_path / "half.gz").write_bytes(whole[: len(whole) - 500])
    taken = 0
    with pytest.raises(UnreadableFile, match="broken gzip"):
        for batch in JsonLines(tmp_path / "half.gz").batches((1, 0), 100, 10_000, 1000):
            taken += batch.body.count(b"\n")
    assert taken >= 4900
    with pytest.raises(UnreadableFile, match="cannot read"):
        list(JsonLines(tmp_path / "none").batches((1, 0), 100, 10_000, 1000))


def test_a_changed_file_is_a_new_one(tmp_path: Path) -> None:
    """Its position would point anywhere; broken position files count for nothing."""
    file = written(tmp_path / "a", [b"a"])
    Bookmark(tmp_path, file, "way").write(Position(line=7))
    assert Bookmark(tmp_path, file, "way").read().line == 7
    assert Bookmark(tmp_path, file, "another way").read().line == 1
    next((tmp_path / "state" / "imports").iterdir()).write_text("{", encoding="utf-8")
    assert Bookmark(tmp_path, file, "way").read().line == 1
    Bookmark(tmp_path, file, "way").write(Position(line=7))
    written(file, [b"a", b"b"])
    assert Bookmark(tmp_path, file, "way").read().line == 1
