"""The base's side of the KL, ahead of the steps that need it: hidden states of replay answers, many rows at a time.

Every step would otherwise run the base over its few replay rows, too few to fill a GPU. A block of steps is prepared
at once; a block's rows and passes follow from the plan alone, so that a resumed run computes what the first one did.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from loop.trainers.batches import Batches
from loop.trainers.loss import Amp, answer_states
from loop.trainers.shares import shares
from loop.trainers.team import ALONE, Team

MOST_STEPS = 32
MOST_BYTES = 256 * 2**20  # of one block's states
TOKENS_A_PASS = 4096  # without gradients: a fraction of a training step's memory


class BaseStates:
    """`anew`: steps before which the base changes, so that no block may reach over them. A rank has its own rows'."""

    def __init__(
        self, batches: Batches, plan: Sequence[list[int]], amp: Amp, anew: Sequence[int] = (), team: Team = ALONE
    ) -> None:
        self._batches = replace(batches, at_once=max(TOKENS_A_PASS, batches.at_once or 0))
        self._team = team
        self._plan, self._amp, self._anew = plan, amp, frozenset(anew)
        self._starts: list[int] = []
        self._block = -1
        self._states: dict[int, torch.Tensor] = {}

    def for_step(self, model: Any, step: int) -> None:
        """Has the states of the block around `step` (counted from 0) at hand; drops other ones."""
        if not self._starts:
            self._starts = _block_starts(self._plan, self._bytes(model), self._anew)
        block = bisect_right(self._starts, step) - 1
        if block != self._block:
            end = self._starts[block + 1] if block + 1 < len(self._starts) else len(self._plan)
            self._states = {}
            self._states = self._compute(model, self._dealt(range(self._starts[block], end)))
            self._block = block

    def _dealt(self, steps: range) -> list[set[int]]:
        """The rows of these steps, of each rank."""
        lengths, size = self._batches.lengths, self._team.size
        dealt: list[set[int]] = [set() for _ in range(size)]
        for step in steps:
            for rows, of_step in zip(dealt, shares(self._plan[step], lengths, size), strict=True):
                rows.update(of_step)
        return dealt

    def forget(self) -> None:
        """The base has been exchanged, be it earlier than planned: what it said no longer holds."""
        self._block, self._states = -1, {}

    def of(self, model: Any, rows: Sequence[int]) -> torch.Tensor | None:
        """(answer tokens x hidden) of these rows, one after the other; None for no rows."""
        if not rows:
            return None
        missing = set(rows) - self._states.keys()
        if missing:  # outside of any block: the batch that is tried before the first step, by every rank
            return _in_order(self._compute(model, [set(rows)] * self._team.size), rows)
        return _in_order(self._states, rows)

    def _compute(self, model: Any, dealt: Sequence[set[int]]) -> dict[int, torch.Tensor]:
        """Of this rank's rows among each rank's."""
        examples = self._batches.examples
        held = [
            sorted((row for row in rows if examples[row].replay), key=lambda row: (len(examples[row].tokens), row))
            for rows in dealt
        ]
        found: dict[int, torch.Tensor] = {}
        for part in self._batches.base_parts(held, self._team):
            with torch.no_grad(), model.disable_adapter():
                states = answer_states(model, part.to(model.device), self._amp)
            if part.idle:
                continue
            sizes = [self._batches.answer_tokens(row) for row in part.held_rows]
            found.update(zip(part.held_rows, states.split(sizes), strict=True))
        return found

    def _bytes(self, model: Any) -> list[int]:
        """Of each row's states; nothing for rows that are not held."""
        width = 2 * model.get_base_model().config.get_text_config().hidden_size
        return [
            width * self._batches.answer_tokens(row) if example.replay else 0
            for row, example in enumerate(self._batches.examples)
        ]


def _in_order(states: dict[int, torch.Tensor], rows: Sequence[int]) -> torch.Tensor:
    return torch.cat([states[row] for row in rows])


def _block_starts(plan: Sequence[list[int]], row_bytes: list[int], anew: frozenset[int]) -> list[int]:
    starts, size = [0], 0
    for step, rows in enumerate(plan):
        needed = sum(row_bytes[row] for row in rows)
        if step > starts[-1] and (step in anew or step - starts[-1] >= MOST_STEPS or size + needed > MOST_BYTES):
            starts.append(step)
            size = 0
        size += needed
    return starts
