"""One run through a plan of steps, whatever is trained: its limits, progress lines, checkpoints, and how it ended.

The loops (`sft_loop`, `preference_loop`) bring a trainer that has its plan, its loss and its optimizer.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PrinterCallback, TrainerCallback, set_seed

from labeling.errors import NightschoolError
from loop.trainers.checkpoints import CHECKPOINTS, last_complete, mark_complete
from loop.trainers.governor import Governor
from loop.trainers.late_log import SECONDS
from loop.trainers.pace import Pace
from loop.trainers.progress import Channel, peak_resident_bytes, resident_bytes
from loop.trainers.served_base import FinishOnServedBase
from loop.trainers.spec import Progress, TrainSpec
from loop.trainers.team import team

LAST_STEPS = 10  # over which final figures are averaged


class Diverged(NightschoolError):
    code = "training_diverged"
    default_hint = "Lower trainer.learning_rate, or look for broken rows in this night's delta."


@dataclass(frozen=True)
class Trained:
    model: Any
    steps: int
    tokens: int
    seconds: float
    final_loss: float
    unquantised_steps: int
    planned_steps: int
    time_limited: bool
    peak_memory_bytes: int
    device: str
    final_margin: float | None = None  # of dpo and orpo
    packed: bool = False
    not_packed: str = ""  # why


class Reporter(TrainerCallback):
    """Progress lines out, checkpoints marked complete, a run gone wrong stopped. `tokens`: of each step."""

    def __init__(
        self,
        channel: Channel,
        tokens: Sequence[int],
        run_digest: str,
        governor: Governor,
        finish: FinishOnServedBase | None = None,
    ) -> None:
        self._channel, self._tokens, self._run_digest = channel, tokens, run_digest
        self._governor, self._finish = governor, finish
        self._since = time.monotonic()

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._since = time.monotonic()

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float], **_: Any) -> None:
        if "loss" not in logs:  # the summary at the end
            return
        if not math.isfinite(logs["loss"]):
            raise Diverged(f"the loss became {logs['loss']} at step {state.global_step}")
        if not math.isfinite(logs["grad_norm"]):
            raise Diverged(f"the gradient became {logs['grad_norm']} at step {state.global_step}")
        self._channel.mark("first_step")
        rate = self._governor.rate_of(state.global_step)
        self._channel.step(
            Progress(
                step=state.global_step,
                total_steps=state.max_steps,
                loss=logs["loss"],
                grad_norm=logs["grad_norm"],
                learning_rate=logs["learning_rate"] if rate is None else rate,
                tokens_per_s=self._tokens[state.global_step - 1] / logs.get(SECONDS, time.monotonic() - self._since),
                memory_bytes=torch.cuda.memory_allocated() if torch.cuda.is_available() else resident_bytes(),
                elapsed_s=self._channel.elapsed_seconds(),
                seconds_left=self._governor.pace.seconds_left(state.global_step),
                unquantised=self._finish is not None and self._finish.steps > 0,
                time_limited=self._governor.pace.limited,
            )
        )

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        checkpoint = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        team().wait()  # a backend may have each rank write its part
        if not team().leads:
            return
        self._governor.keep(checkpoint)
        mark_complete(checkpoint, self._run_digest)


def run_planned(
    trainer: Any,
    spec: TrainSpec,
    model: Any,
    tokens: Sequence[int],
    run_digest: str,
    channel: Channel,
    *,
    room: Callable[[], int] | None = None,
    on_exchange: Callable[[], None] = lambda: None,
) -> Trained:
    """To the end of the plan or of the time, from the last complete checkpoint of the same run where there is one.

    `tokens`: of each planned step. `room`: bytes that the memory plan leaves for the served base; `on_exchange` is told
    when that base has come in. Raises Parked when the machine is wanted back before the end.
    """
    planned = len(tokens)
    checkpoint = last_complete(spec.out_dir / CHECKPOINTS, run_digest)
    pace = Pace(spec.schedule, planned, spec.limits.seconds)
    first = finish_at(spec, planned)
    finish = FinishOnServedBase(
        *(model, spec.base_dir, compute_dtype(), first, planned),
        due=lambda: pace.limited and pace.done >= first / planned,
        room=room,
        on_exchange=on_exchange,
    )
    governor = Governor(pace, spec, channel, checkpoint)
    for callback in (governor, Reporter(channel, tokens, run_digest, governor, finish), finish):
        trainer.add_callback(callback)
    trainer.remove_callback(PrinterCallback)
    set_seed(spec.seed)
    since = time.monotonic()
    trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    team().wait()  # for the first rank's last checkpoint
    steps = finish.total = trainer.state.global_step
    governor.raise_if_parked(steps)
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry][-LAST_STEPS:]
    return Trained(
        model=trainer.model,
        steps=steps,
        tokens=sum(tokens[:steps]),
        seconds=round(time.monotonic() - since, 3),
        final_loss=sum(losses) / len(losses),
        unquantised_steps=finish.steps,
        planned_steps=planned,
        time_limited=pace.cut_short(steps),
        peak_memory_bytes=int(team().most(peak_memory_bytes())),
        device=device_words(model),
    )


def finish_at(spec: TrainSpec, steps: int) -> int:
    """The first step (counted from 0) that is planned on the served base; `steps` where none is."""
    return steps - round(spec.schedule.finish_share * steps) if spec.quantisation == "nf4" else steps


def compute_dtype() -> torch.dtype:
    """bfloat16 where the hardware multiplies it; elsewhere it would be emulated, several times slower."""
    fast = torch.cuda.is_available() or torch.cpu._is_avx512_bf16_supported()  # torch has no public name for it
    return torch.bfloat16 if fast else torch.float32


def single_precision(model: Any) -> None:
    """The adapter's weights: small steps of a late schedule would be lost in the 8 bits of bfloat16. Products run in
    `compute_dtype` all the same."""
    for weight in model.parameters():
        if weight.requires_grad:
            weight.data = weight.data.float()


def own_chance(spec: TrainSpec, step: int) -> None:
    """Of several ranks each draws its rows' dropout by itself, and the same again after a resume."""
    if team().size > 1 and spec.lora.dropout:
        torch.manual_seed(hash((spec.seed, step, team().rank)) % 2**31)


def peak_memory_bytes() -> int:
    """The accelerator's where there is one, else this process's."""
    return torch.cuda.max_memory_allocated() if torch.cuda.is_available() else peak_resident_bytes()


def device_words(model: Any) -> str:
    name = torch.cuda.get_device_name(model.device) if model.device.type == "cuda" else "cpu"
    return f"{name}, {str(compute_dtype()).removeprefix('torch.')}"
