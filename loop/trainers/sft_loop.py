"""Supervised fine-tuning of an adapter: trl's trainer with our loss, our batches and our checkpoints.

The backends (`peft.py`, `unsloth.py`) differ only in how they load the model.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from datasets import Dataset
from torch.optim.lr_scheduler import OneCycleLR
from torch.utils.data import DataLoader
from transformers import get_scheduler
from trl import SFTConfig, SFTTrainer

from labeling.errors import NightschoolError
from loop.trainers.checkpoints import CHECKPOINTS
from loop.trainers.loss import Amp, Batch, collate, retention_loss
from loop.trainers.planned_run import Diverged, Trained, compute_dtype, run_planned
from loop.trainers.progress import Channel
from loop.trainers.rows import Example, heaviest, plan_batches
from loop.trainers.spec import ScheduleSpec, TrainSpec


class OutOfMemory(NightschoolError):
    code = "out_of_memory"
    default_hint = "Lower trainer.batch_size or trainer.max_length, or use quantisation nf4."


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


def train(
    spec: TrainSpec, model: Any, tokenizer: Any, examples: list[Example], run_digest: str, channel: Channel
) -> Trained:
    """As `run_planned`: to the end of the plan or of the time, from a checkpoint where there is one."""
    plan = plan_batches(_lengths(examples), spec.schedule, spec.seed, [example.replay for example in examples])
    tokens = [sum(len(examples[row].tokens) for row in batch) for batch in plan]
    trainer = _trainer(spec, model, tokenizer, examples, plan)
    trainer.try_heaviest(examples)
    return run_planned(trainer, spec, model, tokens, run_digest, channel)


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


def _lengths(examples: Sequence[Example]) -> list[int]:
    return [len(example.tokens) for example in examples]
