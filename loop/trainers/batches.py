"""Rows of a step as tensors: padded to the longest, or packed end to end into one sequence whose rows don't see each
other. A step with more tokens than fit at once comes in parts, whose gradients add up to the whole step's.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import accumulate

import numpy as np
import torch

from loop.trainers.rows import Example, parts_of
from loop.trainers.shares import in_step, most_parts, shares
from loop.trainers.team import Team


@dataclass(frozen=True)
class Part:
    """What goes through the model at once.

    `at`: places in the flattened input whose next token is an answer's, labels' before replay's; of these the first
    `len(targets)` are trained by cross entropy, the others held to the base. The two totals are the whole step's.
    Packed: `positions` restart with every row and `starts` (rows + 1) are where rows begin, the end included.
    """

    input_ids: torch.Tensor  # rows x tokens; packed: 1 x tokens
    at: torch.Tensor
    targets: torch.Tensor
    held_rows: tuple[int, ...]
    total_targets: int
    total_held: int
    positions: torch.Tensor | None = None
    starts: torch.Tensor | None = None
    longest: int = 0
    idle: bool = False  # counts for nothing: a rank passes through the model as often as the others

    def to(self, device: torch.device) -> Part:
        """Without waiting for what the device is at: from pinned memory."""
        held = {name: value for name, value in vars(self).items() if isinstance(value, torch.Tensor)}
        if device.type == "cuda":
            held = {name: value.pin_memory() for name, value in held.items()}
        return replace(self, **{name: value.to(device, non_blocking=True) for name, value in held.items()})


@dataclass(frozen=True)
class Batches:
    """Makes the parts of a step out of its rows' numbers. `hold`: replay rows are held to the base, not trained.

    `even`: rows of one length, or one row alone, go unpacked, where the model takes both: there is no padding to save.
    """

    examples: Sequence[Example]
    pad_id: int
    hold: bool
    packed: bool = False
    even: bool = False
    at_once: int | None = None  # tokens, padding included; a longer row goes alone

    def __call__(self, rows: Sequence[int], of: Sequence[int] | None = None) -> list[Part]:
        """`of`: the whole step's rows, where these are one rank's."""
        split = parts_of(rows, self.lengths, self.at_once, packed=self.packed)
        whole = rows if of is None else of
        held = sum(self.answer_tokens(row) for row in whole if self._is_held(row))
        targets = sum(self.answer_tokens(row) for row in whole) - held
        return [replace(self._part(part), total_targets=targets, total_held=held) for part in split]

    def share(self, rows: Sequence[int], team: Team) -> list[Part]:
        """This rank's parts of a step; idle ones beside them, where ranks hold the base together."""
        dealt = shares(rows, self.lengths, team.size)
        return self._in_step(self(dealt[team.rank], rows), dealt, team)

    def base_parts(self, dealt: Sequence[Sequence[int]], team: Team) -> list[Part]:
        """This rank's parts of rows that the base alone is asked for, each rank its own."""
        return self._in_step(self(dealt[team.rank]), dealt, team)

    def _in_step(self, parts: list[Part], dealt: Sequence[Sequence[int]], team: Team) -> list[Part]:
        def most() -> int:
            return most_parts(dealt, self.lengths, self.at_once, packed=self.packed)

        return in_step(parts, most, team, lambda: self._idle)

    @cached_property
    def _idle(self) -> Part:
        shortest = min(range(len(self.examples)), key=self.lengths.__getitem__)
        return replace(replace(self, hold=False)._part([shortest]), idle=True)

    @cached_property
    def lengths(self) -> list[int]:
        return [len(example.tokens) for example in self.examples]

    def answer_tokens(self, row: int) -> int:
        return len(self.examples[row].tokens) - self.examples[row].answer_start

    def _is_held(self, row: int) -> bool:
        return self.hold and self.examples[row].replay

    def _part(self, rows: Sequence[int]) -> Part:
        """Trained rows first: what is trained and what is held are two slices then."""
        rows = sorted(rows, key=self._is_held)
        lengths = [self.lengths[row] for row in rows]
        packed = self.packed and not (self.even and min(lengths) == max(lengths))
        starts = [0, *accumulate(lengths)] if packed else [max(lengths) * row for row in range(len(rows))]
        at: list[int] = []
        targets: list[Sequence[int]] = []
        for row, start in zip(rows, starts, strict=False):
            example = self.examples[row]
            at += range(start + example.answer_start - 1, start + len(example.tokens) - 1)
            if not self._is_held(row):
                targets.append(example.tokens[example.answer_start :])
        trained = _flat(targets)
        part = Part(
            input_ids=self._packed_ids(rows) if packed else self._padded_ids(rows, max(lengths)),
            at=torch.tensor(at, dtype=torch.int64),
            targets=trained,
            held_rows=tuple(row for row in rows if self._is_held(row)),
            total_targets=len(trained),
            total_held=len(at) - len(trained),
        )
        if not packed:
            return part
        return replace(
            part,
            positions=torch.cat([torch.arange(length) for length in lengths])[None],
            starts=torch.tensor(starts, dtype=torch.int32),
            longest=max(lengths),
        )

    def _packed_ids(self, rows: Sequence[int]) -> torch.Tensor:
        return _flat([self.examples[row].tokens for row in rows])[None]

    def _padded_ids(self, rows: Sequence[int], width: int) -> torch.Tensor:
        """Padded on the right: causal attention then needs no mask."""
        ids = torch.full((len(rows), width), self.pad_id)
        for number, row in enumerate(rows):
            ids[number, : len(self.examples[row].tokens)] = _flat([self.examples[row].tokens])
        return ids


def _flat(rows: Sequence[Sequence[int]]) -> torch.Tensor:
    """End to end."""
    return torch.from_numpy(np.concatenate([np.empty(0, np.int64), *(np.asarray(row, np.int64) for row in rows)]))
