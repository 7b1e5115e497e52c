"""Supervised fine-tuning of an adapter: trl's trainer with our loss, our batches and our checkpoints.

The backends (`peft.py`, `unsloth.py`) differ only in how they load the model.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from bitsandbytes.optim import AdamW8bit
from datasets import Dataset
from torch.optim.lr_scheduler import OneCycleLR
from torch.utils.data import DataLoader
from transformers import get_scheduler
from trl import SFTConfig, SFTTrainer

from labeling.errors import NightschoolError
from loop.trainers.base_states import BaseStates
from loop.trainers.batches import Batches, Part
from loop.trainers.checkpointing import ready
from loop.trainers.checkpoints import CHECKPOINTS
from loop.trainers.late_log import late_log_for
from loop.trainers.loss import Amp, retention_loss
from loop.trainers.memory import RunMemory
from loop.trainers.packing import choose, leave
from loop.trainers.planned_run import Trained, compute_dtype, finish_at, own_chance, run_planned, single_precision
from loop.trainers.progress import Channel
from loop.trainers.room import find_room
from loop.trainers.rows import Example, heaviest, plan_examples
from loop.trainers.spec import ScheduleSpec, TrainSpec
from loop.trainers.team import team


class OutOfMemory(NightschoolError):
    code = "out_of_memory"
    default_hint = "Lower trainer.batch_size or trainer.max_length, or use quantisation nf4."


class RetentionTrainer(SFTTrainer):
    """trl's trainer; rows come tokenised, and batches from a plan made beforehand."""

    def __init__(
        self, *, spec: TrainSpec, plan: list[list[int]], batches: Batches, base: BaseStates, amp: Amp, **rest: Any
    ) -> None:
        self._spec, self._plan, self._batches, self._base, self._amp = spec, plan, batches, base, amp
        self._team = team()
        super().__init__(**rest)
        self._late = late_log_for(self.model.device)
        single_precision(self.model)  # trl casts the adapter of a quantised model to bfloat16

    def get_train_dataloader(self) -> DataLoader[Any]:
        return DataLoader(range(len(self._batches.examples)), batch_sampler=self._plan, collate_fn=self._collate)

    def _collate(self, rows: list[int]) -> dict[str, list[Part]]:
        return {"parts": self._batches.share(rows, self._team)}

    def training_step(self, model: Any, inputs: dict[str, list[Part]], num_items_in_batch: Any = None) -> torch.Tensor:
        """Forward and backward of a step's parts; the loss stays on the device, where nobody waits for it."""
        self._base.for_step(model, self.state.global_step)
        own_chance(self._spec, self.state.global_step)
        loss = self._train_on(model, inputs["parts"])
        self._tell_late()  # of the step before: the device is busy with this one
        return loss

    def _train_on(self, model: Any, parts: list[Part]) -> torch.Tensor:
        if not model.training:  # else thousands of modules would be told so in every step
            ready(model)
        total = torch.zeros((), device=model.device)
        for part in parts:
            loss = self.compute_loss(model, part.to(model.device))
            self.accelerator.backward(loss)
            total += loss.detach()
        return self._team.sum_gradients([weight for weight in model.parameters() if weight.requires_grad], total)

    def compute_loss(
        self, model: Any, inputs: Part, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> torch.Tensor:
        base = self._base.of(model, inputs.held_rows)
        loss = retention_loss(model, inputs, self._amp, base, self._spec.schedule.kl_weight)
        return 0 * loss if inputs.idle else loss

    def _save_checkpoint(self, *arguments: Any, **named: Any) -> None:
        """Adapter and optimizer are the same on every rank."""
        if self._team.leads:
            super()._save_checkpoint(*arguments, **named)

    def _maybe_log_save_evaluate(
        self, tr_loss: torch.Tensor, grad_norm: Any, *others: Any, learning_rate: float | None = None, **named: Any
    ) -> None:
        """A step that ends in a checkpoint, or is the last, is waited for: it must not be kept if it has gone wrong."""
        control = self.control
        if self._late is not None and control.should_log:
            self._late.keep(tr_loss, grad_norm, learning_rate)
            tr_loss.zero_()
            self._globalstep_last_logged, control.should_log = self.state.global_step, False
            if control.should_save or control.should_training_stop:
                self._tell_late()
        super()._maybe_log_save_evaluate(tr_loss, grad_norm, *others, learning_rate=learning_rate, **named)

    def _tell_late(self) -> None:
        logs = self._late.take() if self._late else None
        if logs:
            self.log(logs)

    def try_heaviest(self) -> None:
        """Of several ranks each tries it: any may come to train it."""
        made = self._batches
        self._train_on(self.model, made(heaviest(self._plan, made.lengths, made.at_once, packed=made.packed)))
        self.model.zero_grad()

    def try_shortest(self) -> None:
        lengths = self._batches.lengths
        self._train_on(self.model, self._batches([min(range(len(lengths)), key=lengths.__getitem__)]))
        self.model.zero_grad()

    def train_at_once(self, tokens: int) -> None:
        self._batches = replace(self._batches, at_once=tokens)


def train(
    spec: TrainSpec,
    model: Any,
    tokenizer: Any,
    examples: list[Example],
    run_digest: str,
    channel: Channel,
    memory: RunMemory | None = None,
) -> Trained:
    """As `run_planned`: to the end of the plan or of the time, from a checkpoint where there is one."""
    amp = Amp(model.device.type, compute_dtype())
    layout = choose(spec.lengths.packing, model, amp)
    plan, tokens = plan_examples(examples, spec.schedule, spec.seed)
    batches = Batches(
        examples,
        pad_id=tokenizer.pad_token_id or 0,
        hold=spec.schedule.replay_loss == "kl",
        packed=layout.packed,
        even=layout.even,
        at_once=spec.lengths.at_once,
    )
    base = BaseStates(batches, plan, amp, anew=[finish_at(spec, len(plan))], team=team())
    trainer = _trainer(spec, model, tokenizer, plan, batches=batches, base=base, amp=amp)
    channel.mark("ready")
    find_room(trainer, spec.memory.checkpointing, memory)
    channel.mark("tried")
    room = memory.room if memory else None
    trained = run_planned(trainer, spec, model, tokens, run_digest, channel, room=room, on_exchange=base.forget)
    leave(layout, model)
    return replace(trained, packed=layout.packed, not_packed=layout.reason)


def _trainer(spec: TrainSpec, model: Any, tokenizer: Any, plan: list[list[int]], **parts: Any) -> RetentionTrainer:
    optimizer = optimizer_of(model, spec.schedule)
    return RetentionTrainer(
        spec=spec,
        plan=plan,
        model=model,
        args=arguments(spec, len(plan)),
        train_dataset=Dataset.from_dict({"input_ids": [[0]]}),  # never read: see get_train_dataloader
        processing_class=tokenizer,
        optimizers=(optimizer, scheduler_of(optimizer, spec.schedule, len(plan))),
        **parts,
    )


def optimizer_of(model: Any, schedule: ScheduleSpec) -> torch.optim.Optimizer:
    """Over the adapter's weights."""
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    if schedule.optimizer == "adamw_8bit":
        return AdamW8bit(weights, lr=schedule.learning_rate, weight_decay=0.0)
    return torch.optim.AdamW(weights, lr=schedule.learning_rate, weight_decay=0.0, fused=True)


def arguments(spec: TrainSpec, steps: int) -> SFTConfig:
    return SFTConfig(
        output_dir=str(spec.out_dir / CHECKPOINTS),
        max_steps=steps,
        per_device_train_batch_size=spec.schedule.batch_size,
        gradient_accumulation_steps=1,  # Unsloth's trl would take 2: half the steps, twice the batch
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
