"""Supervised fine-tuning of an adapter: trl's trainer with our loss, our batches and our checkpoints.

The backends (`peft.py`, `unsloth.py`) differ only in how they load the model.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from torch.optim.lr_scheduler import OneCycleLR
from torch.utils.data import DataLoader
from transformers import PrinterCallback, TrainerCallback, get_scheduler, set_seed
from trl import SFTConfig, SFTTrainer

from labeling.errors import NightschoolError
from loop.trainers.checkpoints import CHECKPOINTS, last_complete, mark_complete
from loop.trainers.loss import Amp, Batch, collate, retention_loss
from loop.trainers.progress import Channel, peak_resident_bytes, resident_bytes
from loop.trainers.rows import Example, heaviest, plan_batches
from loop.trainers.served_base import FinishOnServedBase
from loop.trainers.spec import Progress, ScheduleSpec, TrainSpec

LAST_STEPS = 10  # over which the final loss is averaged


class Diverged(NightschoolError):
    code = "training_diverged"
    default_hint = "Lower trainer.learning_rate, or look for broken rows in this night's delta."


class OutOfMemory(NightschoolError):
    code = "out_of_memory"
    default_hint = "Lower trainer.batch_size or trainer.max_length, or use quantisation nf4."


@dataclass(frozen=True)
class Trained:
    model: Any
    steps: int
    tokens: int
    seconds: float
    final_loss: float
    unquantised_steps: int
    peak_memory_bytes: int
    device: str
    final_margin: float | None = None  # of dpo and orpo


class RetentionTrainer(SFTTrainer):
    """trl's trainer; rows come tokenised, and batches from a plan made beforehand."""

    def __init__(self, *, spec: TrainSpec, plan: list[list[int]], amp: Amp, **rest: Any) -> None:
        self._spec, self._plan, self._amp = spec, plan, amp
        super().__init__(**rest)
        # trl casts the adapter of a quantised model to bfloat16, whose 8 bits swallow the small steps of a late
        # schedule: weights and optimizer stay in float32, products run in bfloat16.
        for weight in self.model.parameters():
            if weight.requires_grad:
                weight.data = weight.data.float()

    def get_train_dataloader(self) -> DataLoader[Any]:
        return DataLoader(self.train_dataset, batch_sampler=self._plan, collate_fn=self.data_collator)

    def compute_loss(
        self, model: Any, inputs: Batch, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> torch.Tensor:
        schedule = self._spec.schedule
        loss = retention_loss(model, inputs, self._amp, schedule.replay_loss, schedule.kl_weight)
        if not torch.isfinite(loss):
            raise Diverged(f"the loss became {loss.item()} at step {self.state.global_step + 1}")
        return loss

    def try_heaviest(self, examples: Sequence[Example]) -> None:
        """The batch that needs most memory goes first, without a step: out of memory shows in the first minute."""
        batch = self.data_collator([vars(examples[row]) for row in heaviest(self._plan, _lengths(examples))])
        self.model.train()
        self.compute_loss(self.model, self._prepare_inputs(batch)).backward()
        self.model.zero_grad()


class Reporter(TrainerCallback):
    """Progress lines out, checkpoints marked complete, a run gone wrong stopped."""

    def __init__(self, channel: Channel, tokens: list[int], run_digest: str) -> None:
        self._channel, self._tokens, self._run_digest = channel, tokens, run_digest
        self._since = time.monotonic()

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._since = time.monotonic()

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float], **_: Any) -> None:
        if "loss" not in logs:  # the summary at the end
            return
        if not math.isfinite(logs["grad_norm"]):
            raise Diverged(f"the gradient became {logs['grad_norm']} at step {state.global_step}")
        self._channel.step(
            Progress(
                step=state.global_step,
                total_steps=state.max_steps,
                loss=logs["loss"],
                grad_norm=logs["grad_norm"],
                learning_rate=logs["learning_rate"],
                tokens_per_s=self._tokens[state.global_step - 1] / (time.monotonic() - self._since),
                memory_bytes=torch.cuda.memory_allocated() if torch.cuda.is_available() else resident_bytes(),
                elapsed_s=self._channel.elapsed_seconds(),
            )
        )

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        mark_complete(Path(args.output_dir) / f"checkpoint-{state.global_step}", self._run_digest)


def train(
    spec: TrainSpec, model: Any, tokenizer: Any, examples: list[Example], run_digest: str, channel: Channel
) -> Trained:
    """Trains to the end of the plan, from the last complete checkpoint of the same run where there is one."""
    plan = plan_batches(_lengths(examples), spec.schedule, spec.seed, [example.replay for example in examples])
    tokens = [sum(len(examples[row].tokens) for row in batch) for batch in plan]
    trainer = _trainer(spec, model, tokenizer, examples, plan)
    trainer.add_callback(Reporter(channel, tokens, run_digest))
    finish = FinishOnServedBase(model, spec.base_dir, compute_dtype(), finish_at(spec, len(plan)), len(plan))
    trainer.add_callback(finish)
    trainer.remove_callback(PrinterCallback)
    trainer.try_heaviest(examples)
    set_seed(spec.seed)
    since = time.monotonic()
    checkpoint = last_complete(spec.out_dir / CHECKPOINTS, run_digest)
    trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry][-LAST_STEPS:]
    return Trained(
        model=trainer.model,
        steps=trainer.state.global_step,
        tokens=sum(tokens),
        seconds=round(time.monotonic() - since, 3),
        final_loss=sum(losses) / len(losses),
        unquantised_steps=finish.steps,
        peak_memory_bytes=torch.cuda.max_memory_allocated() if torch.cuda.is_available() else peak_resident_bytes(),
        device=device_words(model),
    )


def finish_at(spec: TrainSpec, steps: int) -> int:
    return steps - round(spec.schedule.finish_share * steps) if spec.quantisation == "nf4" else steps


def _trainer(
    spec: TrainSpec, model: Any, tokenizer: Any, examples: list[Example], plan: list[list[int]]
) -> RetentionTrainer:
    optimizer = torch.optim.AdamW(
        [weight for weight in model.parameters() if weight.requires_grad],
        lr=spec.schedule.learning_rate,
        weight_decay=0.0,
        fused=True,
    )
    return RetentionTrainer(
        spec=spec,
        plan=plan,
        amp=Amp(model.device.type, compute_dtype()),
        model=model,
        args=arguments(spec, len(plan)),
        data_collator=lambda rows: collate(rows, pad_id=tokenizer.pad_token_id or 0),
        train_dataset=Dataset.from_list([vars(example) for example in examples]),
        processing_class=tokenizer,
        optimizers=(optimizer, scheduler_of(optimizer, spec.schedule, len(plan))),
    )


def arguments(spec: TrainSpec, steps: int) -> SFTConfig:
    return SFTConfig(
        output_dir=str(spec.out_dir / CHECKPOINTS),
        max_steps=steps,
        per_device_train_batch_size=spec.schedule.batch_size,
        max_grad_norm=spec.schedule.max_grad_norm,
        logging_steps=1,
        logging_nan_inf_filter=False,  # it would hide a loss gone wrong
        save_steps=spec.schedule.save_steps,
        save_total_limit=2,  # the older one counts until the newer is marked complete
        seed=spec.seed,
        use_cpu=not torch.cuda.is_available(),
        bf16=False,  # our loss brings its own autocast
        gradient_checkpointing=False,
        loss_type="nll",
        dataset_kwargs={"skip_prepare_dataset": True},
        remove_unused_columns=False,
        dataloader_pin_memory=False,
        disable_tqdm=True,
        report_to="none",
    )


def scheduler_of(optimizer: torch.optim.Optimizer, schedule: ScheduleSpec, steps: int) -> Any:
    if schedule.scheduler == "one_cycle":
        steps = max(steps, 4)
        share = min(max(schedule.warmup_share, 2 / steps), 1 - 1 / steps)  # torch divides by the length of each phase
        return OneCycleLR(optimizer, max_lr=schedule.learning_rate, total_steps=steps, pct_start=share)
    name = "constant_with_warmup" if schedule.scheduler == "constant" else schedule.scheduler
    return get_scheduler(name, optimizer, int(schedule.warmup_share * steps), steps)


def compute_dtype() -> torch.dtype:
    """bfloat16 where the hardware multiplies it; elsewhere it would be emulated, several times slower."""
    fast = torch.cuda.is_available() or torch.cpu._is_avx512_bf16_supported()  # torch has no public name for it
    return torch.bfloat16 if fast else torch.float32


def device_words(model: Any) -> str:
    name = torch.cuda.get_device_name(model.device) if model.device.type == "cuda" else "cpu"
    return f"{name}, {str(compute_dtype()).removeprefix('torch.')}"


def _lengths(examples: Sequence[Example]) -> list[int]:
    return [len(example.tokens) for example in examples]
