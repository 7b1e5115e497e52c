"""`nightschool bench NAME`: runs one bench, or all, and prints each figure beside its bar."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from importlib import import_module

from rich.console import Console
from rich.table import Table

from labeling.errors import InvalidInput
from service.bench.figure import Figure, Say
from service.bench.promises import whole

# name -> module of service.bench; each has `run(say) -> list[Figure]`.
BENCHES: dict[str, str] = {
    "dedup": "dedup",
    "gateway": "gateway",
    "ingest": "ingest",
    "labelling": "labelling",
    "queue": "queue",
    "redaction": "redaction",
    "selection": "selection",
}


class UnknownBench(InvalidInput):
    code = "unknown_bench"


def run(name: str, *, as_json: bool) -> None:
    if name != "all" and name not in BENCHES:
        raise UnknownBench(f"there is no bench {name!r}", hint=f"One of: all, {', '.join(sorted(BENCHES))}.")
    wanted = sorted(BENCHES) if name == "all" else [name]
    figures = [figure for bench in wanted for figure in whole(bench, _bench(bench)(_say))]
    if as_json:
        print(json.dumps([figure.as_json() for figure in figures], indent=1))
        return
    table = Table("figure", "value", "bar", "met", "what was seen")
    for figure in figures:
        row = figure.as_json()
        value = "not measured" if row["value"] is None else f"{row['value']:g}"
        table.add_row(row["figure"], value, row["bar"], "yes" if row["met"] else "NO", row["detail"])
    Console().print(table)


def _bench(name: str) -> Callable[[Say], list[Figure]]:
    found: Callable[[Say], list[Figure]] = import_module(f"service.bench.{BENCHES[name]}").run
    return found


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
