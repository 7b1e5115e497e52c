"""What `nightschool bench` prints is what docs/bench.md lists, name by name."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import pytest

from service.bench import dedup, ingest, ingest_postgres, queue, selection
from service.bench.postgres import NoPostgres
from service.bench.promises import PROMISES, held
from service.commands import bench
from tests.render_docs import ROOT

PAGE = (ROOT / "docs" / "bench.md").read_text(encoding="utf-8")
LISTED = re.findall(r"^\| (\w+) \| `(\w+)` \|", PAGE, re.MULTILINE)
# So small that their values mean nothing; the gateway's own test has such a run of it.
TINY: dict[Any, dict[str, Any]] = {
    dedup: {"TEXTS": 40, "ROUNDS": 1},
    ingest: {"ROUNDS": 1, "SECONDS": 0.2, "EXCHANGES": 20},
    ingest_postgres: {"ROUNDS": 1, "SINGLE_SECONDS": 0.1, "BATCHES": 1},
    queue: {"FEW": 600, "MANY": 700, "TURNS": 2, "WARM_UP": 1},
    selection: {"COMPANIES": 2, "NIGHTS": 2},
}


def test_every_bench_and_figure_is_listed_once() -> None:
    """The table is drawn from the list that figures are made by; here it is read as a person reads it."""
    assert [(name, figure) for name, figures in PROMISES.items() for figure in figures] == LISTED
    assert len({figure for _, figure in LISTED}) == len(LISTED)
    assert PROMISES.keys() == bench.BENCHES.keys()


@pytest.mark.parametrize("name", ["dedup", "queue", "selection", pytest.param("ingest", marks=pytest.mark.slow)])
def test_a_bench_gives_the_figures_that_are_listed(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """All of them, measured or not, and no other."""
    for module, sizes in TINY.items():
        for size, value in sizes.items():
            monkeypatch.setattr(module, size, value)
    given = [figure.figure for figure in bench._bench(name)(lambda _line: None)]
    assert sorted(given) == sorted(figure for of, figure in LISTED if of == name)


def test_what_is_not_listed_can_not_be_given() -> None:
    with pytest.raises(KeyError, match="gateway_vs_all"):
        held("gateway_vs_all", 1.0)


def test_what_a_bench_leaves_out_is_printed_as_not_met(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """In the order of the list; a figure of another bench is a mistake."""
    given = [held("near_duplicate_recall", 1.0, "all")]
    monkeypatch.setattr(bench, "import_module", lambda _name: SimpleNamespace(run=lambda _say: given))
    bench.run("dedup", as_json=True)
    first, second = json.loads(capsys.readouterr().out)
    assert (first["figure"], first["value"], first["met"]) == ("near_duplicates_vs_datasketch", None, False)
    assert first["detail"] == "not measured: the bench gave none"
    assert (second["figure"], second["bar"], second["met"]) == ("near_duplicate_recall", ">= 0.99", True)
    with pytest.raises(KeyError, match="near_duplicate_recall"):
        bench.run("queue", as_json=True)


def test_without_postgresql_its_figures_are_not_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    """All three, with the reason; a count of no deadlocks would look as if it had been seen."""

    def none() -> Any:
        raise NoPostgres("no initdb here")

    monkeypatch.setattr(ingest_postgres, "_server", none)
    found = [figure.as_json() for figure in ingest_postgres.run(lambda _line: None)]
    assert [one["figure"] for one in found] == [name for name in PROMISES["ingest"] if name.startswith("postgres")]
    assert {(one["value"], one["met"]) for one in found} == {(None, False)}
    assert all("no initdb here" in one["detail"] for one in found)


LOGS_MEANWHILE = """
import sys, types
import structlog
from service.bench.promises import held
from service.cli import main
from service.commands import bench
module = types.ModuleType("service.bench.talking")
def run(say):
    structlog.get_logger().warning("pulled", annotations=1)
    return [held("queue_1m_vs_10k", 1.0, "seen")]
module.run = run
sys.modules["service.bench.talking"] = module
bench.BENCHES["queue"] = "talking"
sys.argv = ["nightschool", "bench", "queue", "--json"]
main()
"""


def test_what_the_product_logs_meanwhile_is_not_among_the_figures() -> None:
    """Whoever asks for JSON reads standard output to its end."""
    ran = subprocess.run([sys.executable, "-c", LOGS_MEANWHILE], capture_output=True, text=True, check=True)
    assert [figure["figure"] for figure in json.loads(ran.stdout)] == ["queue_1m_vs_10k"]
    assert "pulled" in ran.stderr
