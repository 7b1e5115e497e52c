"""A family's rows as a file of the night: one line an item, with the scores and answers of base, current, candidate."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loop.digests import read_jsonl, write_jsonl
from loop.gate_families import MODELS, Family, PairedItem
from loop.outputs import FamilyResult


@dataclass(frozen=True)
class Result:
    """One model's answer to one item and its score; None where it was not a number."""

    answer: str
    score: float | None


@dataclass(frozen=True)
class ExaminedItem:
    id: str
    prompt: str
    reference: str | None
    base: Result
    current: Result
    candidate: Result


def write_family(folder: Path, name: str, items: Sequence[ExaminedItem]) -> FamilyResult:
    path = folder / f"family-{name.replace(':', '-')}.jsonl"
    write_jsonl(path, [_row(item) for item in items])
    family = _family(name, read_jsonl(path))
    return FamilyResult(
        name=name,
        n=family.n,
        base=_finite(family.mean("base")),
        current=_finite(family.mean("current")),
        candidate=_finite(family.mean("candidate")),
        lost=family.lost,
        won=family.won,
        rows_path=str(path),
    )


def read_family(result: FamilyResult) -> Family:
    """From the file, not from the summary; one that is gone or cut short is a family without items."""
    try:
        return _family(result.name, read_jsonl(Path(result.rows_path)))
    except (OSError, ValueError, KeyError, TypeError):
        return Family(result.name, ())


def regressions(result: FamilyResult) -> list[dict[str, Any]]:
    """Rows that the current model has right, or righter, and the candidate has not; none where the gate saw none."""
    lost = {item.id for item in read_family(result).items if item.candidate < item.current}
    return [row for row in read_jsonl(Path(result.rows_path)) if row["id"] in lost] if lost else []


def _row(item: ExaminedItem) -> dict[str, Any]:
    results: dict[str, Result] = {model: getattr(item, model) for model in MODELS}
    return {
        "id": item.id,
        "prompt": item.prompt,
        "reference": item.reference,
        **{model: result.score for model, result in results.items()},
        "answers": {model: result.answer for model, result in results.items()},
    }


def _family(name: str, rows: Sequence[dict[str, Any]]) -> Family:
    items = tuple(PairedItem(row["id"], *[_score(row[model]) for model in MODELS]) for row in rows)
    silent = tuple(model for model in MODELS if rows and not any(row["answers"][model].strip() for row in rows))
    return Family(name, items, silent)


def _score(value: float | None) -> float:
    return math.nan if value is None else float(value)


def _finite(value: float) -> float:
    """JSON has no NaN; the rows say what was wrong and the gate stops at them."""
    return value if math.isfinite(value) else 0.0
