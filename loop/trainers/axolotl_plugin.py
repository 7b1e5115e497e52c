"""What axolotl is told through its own door for plugins: our limits and lines. Imported by axolotl in our process."""

from __future__ import annotations

import inspect
from typing import Any

from axolotl.integrations.base import BasePlugin
from transformers import TrainerCallback
from transformers.trainer import unwrap_peft_model

from loop.trainers.governor import Governor
from loop.trainers.planned_run import Reporter, peak_memory_bytes
from loop.trainers.sft_loop import scheduler_of
from loop.trainers.spec import ScheduleSpec
from loop.trainers.team import team


class Told(BasePlugin):
    """`callbacks` are set by the trainer process before axolotl makes its trainer."""

    callbacks: tuple[Governor, Reporter] | None = None
    schedule: ScheduleSpec | None = None
    peak_bytes = 0  # as `peak_memory_bytes`: of this rank while it trains, at the end the highest of all

    def add_callbacks_pre_trainer(self, cfg: Any, model: Any) -> list[TrainerCallback]:
        if Told.callbacks is None:
            return []
        governor, reporter = Told.callbacks
        return [governor, _Numbers(reporter)]

    def create_lr_scheduler(self, cfg: Any, trainer: Any, optimizer: Any, num_training_steps: int) -> Any:
        """The very rates of the other backends: axolotl's own count the steps of a warm-up otherwise, and its one_cycle
        does not know DeepSpeed's optimizer, in which the one that steps lies."""
        if Told.schedule is None:
            return None
        while hasattr(optimizer, "optimizer"):
            optimizer = optimizer.optimizer
        return scheduler_of(optimizer, Told.schedule, num_training_steps)

    def post_trainer_create(self, cfg: Any, trainer: Any) -> None:
        """Every answer token of a step weighs the same, in whichever part or on whichever card it is.

        axolotl's trainer would take each part's mean, and then the mean of those.
        """
        if not cfg.rl:
            forward = unwrap_peft_model(trainer.model).forward
            kinds = {parameter.kind for parameter in inspect.signature(forward).parameters.values()}
            trainer.model_accepts_loss_kwargs = inspect.Parameter.VAR_KEYWORD in kinds


class _Numbers(TrainerCallback):
    """axolotl's log lines hold numbers as words."""

    def __init__(self, reporter: Reporter) -> None:
        self._reporter = reporter

    def on_step_begin(self, args: Any, state: Any, control: Any, **rest: Any) -> None:
        self._reporter.on_step_begin(args, state, control, **rest)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """axolotl's log forgets the peak after each step."""
        Told.peak_bytes = max(Told.peak_bytes, peak_memory_bytes())

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Now: once axolotl has trained, its ranks hear nothing of each other any more."""
        Told.peak_bytes = int(team().most(Told.peak_bytes))

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any], **rest: Any) -> None:
        if "loss" in logs:
            numbers = {name: float(logs[name]) for name in ("loss", "grad_norm", "learning_rate")}
            self._reporter.on_log(args, state, control, logs=numbers, **rest)

    def on_save(self, args: Any, state: Any, control: Any, **rest: Any) -> None:
        self._reporter.on_save(args, state, control, **rest)
