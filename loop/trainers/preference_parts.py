"""A step of preferences as tensors, in parts of which each fits into memory: pairs or thumbs, and replay rows apart.

A pair's two rows stay together. Each part knows its share of the step, so that its loss is its part of the step's mean.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Literal

import torch

from loop.trainers.preference_loss import Padded
from loop.trainers.preference_rows import Unit, mismatched
from loop.trainers.rows import Example, parts_of, weight

Step = tuple[list[int], list[int]]  # numbers of units, of replay rows
Objective = Literal["dpo", "orpo", "kto"]


@dataclass(frozen=True)
class Preferences:
    """All that a run trains on; `replay` holds the model to the base."""

    objective: Objective
    units: Sequence[Unit]
    replay: Sequence[Example]


@dataclass(frozen=True)
class PreferencePart:
    """`rows`: all chosen ones, then all rejected ones; or thumbs, whose verdicts are `good`; or replay rows, `held`.

    `of_units`: its share of the step's units; `of_tokens`: of the answers' tokens of its kind (of pairs, the chosen).
    """

    rows: Padded
    of_tokens: float
    of_units: float = 0.0
    good: torch.Tensor | None = None
    held: bool = False

    def to(self, device: Any) -> PreferencePart:
        return replace(self, rows=self.rows.to(device), good=None if self.good is None else self.good.to(device))


@dataclass(frozen=True)
class StepParts:
    """`mismatched`: of thumbs, all rows of the step that the drift is measured on."""

    parts: tuple[PreferencePart, ...]
    mismatched: tuple[Padded, ...] = ()


@dataclass(frozen=True)
class PreferenceParts:
    """Makes the parts of a step out of the numbers of its units and replay rows."""

    data: Preferences
    pad_id: int
    max_length: int
    at_once: int | None = None  # tokens, padding included; a longer pair or row goes alone

    def __call__(self, step: Step) -> StepParts:
        units, held = step
        parts = [self._of_units(some, units) if some else self._of_held(rows, held) for some, rows in self.split(step)]
        return StepParts(tuple(parts), tuple(self._mismatched(units)))

    def split(self, step: Step) -> list[Step]:
        """A unit's rows are padded together, to the longest of the part."""
        units, held = step
        wide = None if self.at_once is None else self.at_once // self._rows_a_unit
        return [(part, []) for part in parts_of(units, self._widths, wide)] + [
            ([], part) for part in parts_of(held, self._lengths, self.at_once)
        ]

    def heaviest(self, plan: Iterable[Step]) -> Step:
        """The part of all steps that needs most memory, as a step of its own."""
        return max((part for step in plan for part in self.split(step)), key=self._weight)

    def _weight(self, part: Step) -> int:
        units, held = part
        return self._rows_a_unit * weight(units, self._widths) if units else weight(held, self._lengths)

    @property
    def _rows_a_unit(self) -> int:
        return 1 if self.data.objective == "kto" else 2

    @cached_property
    def _widths(self) -> list[int]:
        return [max(len(row.tokens) for row in unit.rows) for unit in self.data.units]

    @cached_property
    def _lengths(self) -> list[int]:
        return [len(row.tokens) for row in self.data.replay]

    def _of_units(self, numbers: Sequence[int], step: Sequence[int]) -> PreferencePart:
        units = [self.data.units[number] for number in numbers]
        whole = [self.data.units[number].rows[0] for number in step]
        return PreferencePart(
            rows=Padded.of([unit.rows[side] for side in range(self._rows_a_unit) for unit in units], self.pad_id),
            of_tokens=_answers(unit.rows[0] for unit in units) / _answers(whole),
            of_units=len(numbers) / len(step),
            good=torch.tensor([bool(unit.good) for unit in units]) if self.data.objective == "kto" else None,
        )

    def _of_held(self, numbers: Sequence[int], step: Sequence[int]) -> PreferencePart:
        rows, whole = ([self.data.replay[number] for number in some] for some in (numbers, step))
        return PreferencePart(Padded.of(rows, self.pad_id), _answers(rows) / _answers(whole), held=True)

    def _mismatched(self, numbers: Sequence[int]) -> list[Padded]:
        """Of thumbs; they take no gradient, but are as many at once all the same."""
        if self.data.objective != "kto" or not numbers:
            return []
        rows = mismatched([self.data.units[number] for number in numbers], self.max_length)
        parts = parts_of(range(len(rows)), [len(row.tokens) for row in rows], self.at_once)
        return [Padded.of([rows[number] for number in part], self.pad_id) for part in parts]


def _answers(rows: Iterable[Example]) -> int:
    """Tokens."""
    return sum(len(row.tokens) - row.answer_start for row in rows)
