"""Pairs and thumbs as files and as tokens, and in which order they are trained. No torch: the tokenizer is given."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from pydantic import Field, TypeAdapter, model_validator

from labeling.settings import Strict
from loop.digests import write_jsonl
from loop.methods import Method
from loop.trainers.rows import Draws, Example, plan_batches, rows_drawn, tokenise
from loop.trainers.spec import PAIRS_FILE, THUMBS_FILE, Answered, Message, Row, ScheduleSpec, read_lines


class Pair(Strict):
    """Of one prompt's two answers, the first is better."""

    id: str = Field(min_length=1)
    prompt: tuple[Message, ...] = Field(min_length=1)
    chosen: str = Field(min_length=1)
    rejected: str = Field(min_length=1)

    @model_validator(mode="after")
    def _differ(self) -> Pair:
        if not self.chosen.strip() or not self.rejected.strip():
            raise ValueError("chosen and rejected must not be empty")
        if self.chosen.split() == self.rejected.split():
            raise ValueError("chosen and rejected are the same answer")
        return self


class Thumb(Answered):
    """Users called its answer good or bad."""

    good: bool


@dataclass(frozen=True)
class Unit:
    """What is trained together: a pair's two rows, or a thumb's one. `good` is None for a pair, chosen first."""

    id: str
    rows: tuple[Example, ...]
    good: bool | None = None

    @property
    def tokens(self) -> int:
        return sum(len(row.tokens) for row in self.rows)


T = TypeVar("T", Pair, Thumb)
_PAIR, _THUMB = TypeAdapter(Pair), TypeAdapter(Thumb)


def read_pairs(data_dir: Path) -> list[Pair]:
    """Empty where there is no such file."""
    return _read(data_dir / PAIRS_FILE, _PAIR)


def read_thumbs(data_dir: Path) -> list[Thumb]:
    return _read(data_dir / THUMBS_FILE, _THUMB)


def write_preferences(data_dir: Path, pairs: Sequence[Pair], thumbs: Sequence[Thumb]) -> None:
    """No file for what there is none of: a night of corrections alone looks as it always did."""
    for name, rows in ((PAIRS_FILE, pairs), (THUMBS_FILE, thumbs)):
        if rows:
            write_jsonl(data_dir / name, [row.model_dump(mode="json") for row in rows])


def _read(path: Path, kind: TypeAdapter[T]) -> list[T]:
    return read_lines(path, kind) if path.exists() else []


def preference_rows(data_dir: Path) -> list[Row]:
    """Each answer of each pair, and each thumb, as a row of its own."""
    return [*_sides(read_pairs(data_dir)), *_thumbed(read_thumbs(data_dir))]


def _sides(pairs: Sequence[Pair]) -> list[Row]:
    return [
        _row(f"{pair.id}/{side}", pair.prompt, getattr(pair, side)) for pair in pairs for side in ("chosen", "rejected")
    ]


def _thumbed(thumbs: Sequence[Thumb]) -> list[Row]:
    return [_row(thumb.id, thumb.messages[:-1], thumb.messages[-1].content) for thumb in thumbs]


def pair_units(pairs: Iterable[Pair], tokenizer: Any, stop_ids: frozenset[int], max_length: int) -> list[Unit]:
    """Both answers through the template of the base, like every other row; too long ones are refused by name."""
    pairs = list(pairs)
    made = list(tokenise(_sides(pairs), tokenizer, stop_ids, max_length))
    return [Unit(pair.id, (made[2 * n], made[2 * n + 1])) for n, pair in enumerate(pairs)]


def thumb_units(thumbs: Iterable[Thumb], tokenizer: Any, stop_ids: frozenset[int], max_length: int) -> list[Unit]:
    thumbs = list(thumbs)
    made = tokenise(_thumbed(thumbs), tokenizer, stop_ids, max_length)
    return [Unit(thumb.id, (row,), thumb.good) for thumb, row in zip(thumbs, made, strict=True)]


def _row(name: str, prompt: Sequence[Message], answer: str) -> Row:
    return Row(id=name, messages=(*prompt, Message(role="assistant", content=answer)), kind="label")


def mismatched(units: Sequence[Unit], max_length: int) -> list[Example]:
    """Each thumb's prompt with its neighbour's answer, cut to length: what KTO measures the drift from the base on.

    arXiv:2402.01306, section 4.1, as trl does it, within a batch.
    """
    answers = [unit.rows[0].tokens[unit.rows[0].answer_start :] for unit in units]
    made = []
    for unit, answer in zip(units, [answers[-1], *answers[:-1]], strict=True):
        row = unit.rows[0]
        tokens = (*row.tokens[: row.answer_start], *answer)[: max(max_length, row.answer_start + 1)]
        made.append(Example(f"{row.id}/mismatched", tokens, row.answer_start, False))
    return made


def halved(batch_size: int) -> int:
    """Units a step: each is two rows, a pair's own or a thumb's and its mismatched one. So memory stays that of sft."""
    return max(batch_size // 2, 1)


def units_a_step(method: Method, batch_size: int) -> int:
    """Of its last phase: rows, pairs or thumbs."""
    return batch_size if method == "sft" else halved(batch_size)


@dataclass(frozen=True)
class PreferenceDraws:
    """A recipe as `rows_drawn` reads it, for a step that trains pairs or thumbs."""

    epochs: float
    min_steps: int
    batch_size: int
    replay_share: float

    @classmethod
    def of(cls, recipe: Draws) -> PreferenceDraws:
        return cls(recipe.epochs, recipe.min_steps, halved(recipe.batch_size), recipe.replay_share)


def plan_units(
    units: Sequence[Unit], replay: Sequence[Example], schedule: ScheduleSpec, seed: int
) -> list[tuple[list[int], list[int]]]:
    """For every step: which units, which replay rows. As `plan_batches`: settled beforehand, replay in every batch."""
    lengths = [*(unit.tokens for unit in units), *(len(row.tokens) for row in replay)]
    flags = [False] * len(units) + [True] * len(replay)
    halved_schedule = schedule.model_copy(update={"batch_size": halved(schedule.batch_size)})
    plan = plan_batches(lengths, halved_schedule, seed, flags)
    first = len(units)
    return [([n for n in batch if n < first], [n - first for n in batch if n >= first]) for batch in plan]


def most_of_each(units: int, replay: int, schedule: ScheduleSpec) -> tuple[int, int]:
    """Units and replay rows that a step of `plan_units` has at the most, of so many in all."""
    draws = PreferenceDraws.of(schedule)
    of_units, of_replay = rows_drawn(draws, units, replay=replay > 0)
    return _most(of_units, of_replay, draws.batch_size), _most(of_replay, of_units, draws.batch_size)


def _most(own: int, others: int, places: int) -> int:
    """Both kinds are spread evenly: n of one have at least ceil((n - 1) x others / own) - 1 of the other in between."""
    most = min(own, places)
    while most > 1 and most + -(-(most - 1) * others // own) - 1 > places:
        most -= 1
    return most


def kto_weights(units: Sequence[Unit]) -> tuple[float, float]:
    """(of good, of bad) thumbs: the rarer kind counts as much in all as the other (arXiv:2402.01306, equation 8)."""
    good = sum(bool(unit.good) for unit in units)
    bad = len(units) - good
    return (1.0, 1.0) if not good or not bad else (max(bad / good, 1.0), max(good / bad, 1.0))
