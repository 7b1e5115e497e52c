"""`nightschool export`: a stream of lines from the installation into a file, whole or not at all."""

from __future__ import annotations

import gzip
import json
import shutil
import sys
from collections.abc import AsyncIterator, Sequence
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

from labeling.errors import Conflict, InvalidInput, Unavailable
from service.commands.local_api import Api, with_api

FORMS = ("jsonl", "parquet")


class TargetExists(Conflict):
    code = "target_exists"
    default_hint = "Use --force to overwrite it, or name another one."


class BadTarget(InvalidInput):
    code = "bad_target"


class NoPyarrow(InvalidInput):
    code = "no_pyarrow"
    default_hint = "Install the extra nightschool[parquet], or use JSON lines."


class ExportBrokeOff(Unavailable):
    code = "export_broke_off"
    default_hint = "Look at the log of `nightschool up`, then export again: nothing was written to the target."


def run(path: Path, target: Path, *, project: str | None, tables: Sequence[str], form: str, force: bool) -> None:
    if form not in FORMS:
        raise BadTarget(f"no format {form!r}", hint=f"Formats: {', '.join(FORMS)}.")
    if target.exists() and not force:
        raise TargetExists(f"{target} exists already")
    parquet = with_pyarrow() if form == "parquet" else None
    temporary = target.with_name(f".{target.name}.part")
    _remove(temporary)
    params: dict[str, Any] = {**({"project": project} if project else {}), "table": list(tables)}

    async def body(api: Api) -> dict[str, int]:
        async with api.stream("/v1/export", params) as answer:
            if parquet is not None:
                return whole(await parquet.write(_lines(answer.aiter_bytes()), temporary))
            return await _as_lines(answer.aiter_bytes(), temporary, packed=target.suffix == ".gz")

    try:
        counts = with_api(path, body, streams=True)
        _replace(temporary, target)
    except OSError as error:
        raise BadTarget(f"cannot write {target}: {error.strerror}", hint="Name a place with room.") from error
    finally:
        _remove(temporary)
    for table, count in counts.items():
        print(f"{count:>12,}  {table}", file=sys.stderr)
    print(f"Wrote {target}.")


def with_pyarrow() -> ModuleType:
    """The one module that needs it."""
    try:
        return import_module("service.transfer.parquet")
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != "pyarrow":
            raise
        raise NoPyarrow("Parquet needs pyarrow, which is not installed") from None


async def _lines(chunks: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    rest = b""
    async for chunk in chunks:
        *lines, rest = (rest + chunk).split(b"\n")
        for line in lines:
            yield line
    if rest.strip():
        raise ExportBrokeOff("the export broke off in the middle of a line")


async def _as_lines(chunks: AsyncIterator[bytes], target: Path, *, packed: bool) -> dict[str, int]:
    """The last line has the counts; an answer without it is half an answer."""
    last = b""
    with gzip.open(target, "wb", compresslevel=6) if packed else target.open("wb") as file:
        async for chunk in chunks:
            file.write(chunk)
            last = (last + chunk)[-65_536:]
    return counts_of(last)


def counts_of(tail: bytes) -> dict[str, int]:
    lines = tail.rstrip(b"\n").rsplit(b"\n", 1)
    try:
        return whole(json.loads(lines[-1])["end"])
    except (ValueError, KeyError, TypeError):
        return whole({})


def whole(counts: dict[str, int]) -> dict[str, int]:
    if not counts:
        raise ExportBrokeOff("the export broke off before its last line")
    return counts


def _replace(temporary: Path, target: Path) -> None:
    if target.is_dir():
        shutil.rmtree(target)
    temporary.replace(target)


def _remove(temporary: Path) -> None:
    if temporary.is_dir():
        shutil.rmtree(temporary, ignore_errors=True)
    else:
        temporary.unlink(missing_ok=True)
