"""What an attempt's limits make of a run: its learning rate, when a checkpoint is due by the clock, when it ends."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from loop.trainers.pace import Pace
from loop.trainers.progress import Channel, Parked
from loop.trainers.spec import TrainSpec
from loop.trainers.team import team


class Governor(TrainerCallback):
    """Sets the rate before each step, on top of the planned schedule and never into it: a checkpoint holds the plan.

    `rate_of` a step is what it was made with; None while the plan's own holds.
    """

    def __init__(self, pace: Pace, spec: TrainSpec, channel: Channel, checkpoint: Path | None) -> None:
        self.pace = pace
        self._rates: dict[int, float] = {}  # of this step and the one before, counted from 1
        self._limits, self._highest, self._channel = spec.limits, spec.schedule.learning_rate, channel
        self._saved = channel.elapsed_seconds()
        self._parked = False
        if checkpoint is not None:
            pace.take_up(checkpoint)

    def on_step_begin(
        self, args: Any, state: Any, control: Any, optimizer: Any = None, lr_scheduler: Any = None, **_: Any
    ) -> None:
        self.pace.begin_step(self._channel.elapsed_seconds())
        factor, scale = self.pace.rate_factor(), self._limits.rate_scale
        if factor is None and scale == 1.0:
            return
        planned = lr_scheduler.get_last_lr()[0] if factor is None else self._highest * factor
        rate, step = scale * planned, state.global_step + 1
        self._rates = {step: rate, **{old: kept for old, kept in self._rates.items() if old == step - 1}}
        for group in optimizer.param_groups:
            group["lr"] = rate

    def rate_of(self, step: int) -> float | None:
        """Of the last step (counted from 1) or the one before it: numbers may be told a step late."""
        return self._rates.get(step)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        elapsed = self._channel.elapsed_seconds()
        self.pace.end_step(state.global_step, elapsed)
        minutes = self._limits.save_minutes
        due = minutes is not None and elapsed - self._saved >= 60 * minutes
        save = self._agree(due)
        if save or self._parked:
            control.should_save = True
        if self.pace.ended or self._parked:
            control.should_training_stop = True

    def _agree(self, due: bool) -> bool:
        """Clocks differ, and a signal reaches one rank before the other: as the first rank has it, all do."""
        pace = self.pace
        pace.done, *told = team().agree((pace.done, pace.limited, pace.ended, self._channel.parked, due))
        pace.limited, pace.ended, self._parked, due = (bool(one) for one in told)
        return due

    def raise_if_parked(self, steps: int) -> None:
        """After the run, which made `steps`: unless it had come to its end all the same."""
        if self._parked and steps < self.pace.planned_steps and not self.pace.ended:
            raise Parked(f"the trainer was told to give the machine back, after step {steps}")

    def keep(self, checkpoint: Path) -> None:
        self._saved = self._channel.elapsed_seconds()
        self.pace.keep(checkpoint)
