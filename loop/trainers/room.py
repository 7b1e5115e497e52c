"""Before the first step: whether the heaviest part of all fits into memory, and in which parts it does."""

from __future__ import annotations

from typing import Any, Protocol

from loop.trainers.checkpointing import ensure, ready
from loop.trainers.memory import RunMemory, forget_peak, optimizer_bytes, peak_bytes
from loop.trainers.team import team


class Tried(Protocol):
    """A trainer. A try is forward and backward without a step."""

    model: Any

    def try_shortest(self) -> None: ...

    def try_heaviest(self) -> None:
        """The part of all steps that needs most memory."""

    def train_at_once(self, tokens: int) -> None:
        """Parts of at most so many tokens from here on."""


def find_room(trainer: Tried, checkpointing: str, memory: RunMemory | None) -> None:
    """The heaviest part first, in smaller parts after a near miss. Where memory runs out the process ends: what it
    leaves is in pieces, and another one, started afresh, takes the next plan."""
    ready(trainer.model)
    done = ensure(trainer.model, checkpointing, trainer.try_shortest)
    if done and memory is not None:
        memory.note(done)
    while True:
        forget_peak()
        trainer.try_heaviest()
        if memory is None:
            return
        trained = [weight for weight in trainer.model.parameters() if weight.requires_grad]
        measured = int(team().most(peak_bytes() + optimizer_bytes(trained)))
        if not memory.near_miss(measured) or not memory.lower(measured):
            return
        trainer.train_at_once(memory.plan.micro_tokens)
