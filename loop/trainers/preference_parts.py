"""A step of preferences as tensors, in parts of which each fits into memory: pairs or thumbs, and replay rows apart.

A pair's two rows stay together. Each part knows its share of the step, so that its loss is its part of the step's mean,
on whichever rank it is trained.
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
from loop.trainers.shares import in_step, shares
from loop.trainers.team import ALONE, Team

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

    `of_units`: its share of the whole step's units; `of_tokens`: of the answers' tokens of its kind (of pairs, the
    chosen). Both are 0 of a part that is idle: a rank passes through the model as often as the others.
    """

    rows: Padded
    of_tokens: float
    of_units: float = 0.0
    good: torch.Tensor | None = None
    held: bool = False

    def to(self, device: Any) -> PreferencePart:
        return replace(self, rows=self.rows.to(device), good=None if self.good is None else self.good.to(device))


@dataclass(frozen=True)
class DriftPart:
    """Mismatched rows, which the drift is measured on; `of_rows`: their share of the whole step's, 0 if idle."""

    rows: Padded
    of_rows: float


@dataclass(frozen=True)
class StepParts:
    """What one rank does of a step. `units`: of the whole step, over all ranks; `drift`: of thumbs."""

    parts: tuple[PreferencePart, ...]
    units: int
    drift: tuple[DriftPart, ...] = ()


@dataclass(frozen=True)
class PreferenceParts:
    """Makes the parts of a step out of the numbers of its units and replay rows."""

    data: Preferences
    pad_id: int
    max_length: int
    at_once: int | None = None  # tokens, padding included; a longer pair or row goes alone

    def __call__(self, step: Step, team: Team = ALONE) -> StepParts:
        """A rank's share of a step. Where ranks hold the base together, each has as many parts of a kind as the one
        that has most: a part of another kind passes through the model another number of times."""
        units, held = step
        dealt = self.deal(step, team.size)
        of_units, of_held = [self._unit_parts(own) for own, _ in dealt], [self._held_parts(own) for _, own in dealt]
        own_units = [self._of_units(part, units) for part in of_units[team.rank]]
        own_held = [self._of_held(part, held) for part in of_held[team.rank]]
        parts = in_step(own_units, lambda: max(map(len, of_units)), team, self._idle_unit)
        parts += in_step(own_held, lambda: max(map(len, of_held)), team, self._idle_held)
        return StepParts(tuple(parts), len(units), tuple(self._drift(units, team)))

    def deal(self, step: Step, ranks: int) -> list[Step]:
        """Each rank's units and replay rows. Whoever has less of the units gets more of the replay rows."""
        units, held = step
        of_units = shares(units, self._tokens, ranks)
        has = [sum(self._tokens[unit] for unit in own) for own in of_units]
        return list(zip(of_units, shares(held, self._lengths, ranks, has), strict=True))

    def split(self, step: Step) -> list[Step]:
        """A rank's, each part as a step of its own."""
        units, held = step
        return [(part, []) for part in self._unit_parts(units)] + [([], part) for part in self._held_parts(held)]

    def heaviest(self, plan: Iterable[Step], ranks: int = 1) -> Step:
        """The part of all ranks in all steps that needs most memory, as a step of its own."""
        parts = (part for step in plan for own in self.deal(step, ranks) for part in self.split(own))
        return max(parts, key=self._weight)

    def _weight(self, part: Step) -> int:
        units, held = part
        return self._rows_a_unit * weight(units, self._widths) if units else weight(held, self._lengths)

    def _unit_parts(self, units: Sequence[int]) -> list[list[int]]:
        """A unit's rows are padded together, to the longest of the part."""
        wide = None if self.at_once is None else self.at_once // self._rows_a_unit
        return parts_of(units, self._widths, wide)

    def _held_parts(self, held: Sequence[int]) -> list[list[int]]:
        return parts_of(held, self._lengths, self.at_once)

    @property
    def _rows_a_unit(self) -> int:
        return 1 if self.data.objective == "kto" else 2

    @cached_property
    def _tokens(self) -> list[int]:
        return [unit.tokens for unit in self.data.units]

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

    def _drift(self, step: Sequence[int], team: Team) -> list[DriftPart]:
        """Of thumbs: each with its neighbour in the whole step, then dealt out by themselves, since no rank goes on
        before all have them. They take no gradient, but are as many at once all the same."""
        if self.data.objective != "kto" or not step:
            return []
        rows = mismatched([self.data.units[number] for number in step], self.max_length)
        lengths = [len(row.tokens) for row in rows]
        dealt = [parts_of(own, lengths, self.at_once) for own in shares(range(len(rows)), lengths, team.size)]
        made = [
            DriftPart(Padded.of([rows[number] for number in part], self.pad_id), len(part) / len(rows))
            for part in dealt[team.rank]
        ]
        return in_step(made, lambda: max(map(len, dealt)), team, lambda: DriftPart(self._idle_unit().rows, 0.0))

    def _idle_unit(self) -> PreferencePart:
        shortest = min(range(len(self._widths)), key=self._widths.__getitem__)
        return replace(self._of_units([shortest], [shortest]), of_units=0.0, of_tokens=0.0)

    def _idle_held(self) -> PreferencePart:
        shortest = min(range(len(self._lengths)), key=self._lengths.__getitem__)
        return replace(self._of_held([shortest], [shortest]), of_tokens=0.0)


def _answers(rows: Iterable[Example]) -> int:
    """Tokens."""
    return sum(len(row.tokens) - row.answer_start for row in rows)
