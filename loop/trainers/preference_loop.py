"""Training on pairs (dpo, orpo) and on thumbs (kto): transformers' trainer with our losses, batches and checkpoints.

What is trained is settled beforehand by `plan_units`, replay rows in every batch. The schedule, the checkpoints, the
finish on the served base and the progress lines are those of `planned_run`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch.utils.data import DataLoader
from transformers import Trainer

from loop.trainers.loss import Amp
from loop.trainers.planned_run import LAST_STEPS, Diverged, Trained, compute_dtype, run_planned, single_precision
from loop.trainers.preference_loss import (
    Padded,
    Scored,
    cross_entropy,
    dpo_loss,
    held_loss,
    kto_loss,
    orpo_loss,
    score,
    score_base,
)
from loop.trainers.preference_rows import Unit, kto_weights, mismatched, plan_units
from loop.trainers.progress import Channel, Relay
from loop.trainers.rows import Example
from loop.trainers.sft_loop import arguments, optimizer_of, scheduler_of
from loop.trainers.spec import Progress, TrainSpec

Step = tuple[list[int], list[int]]  # numbers of units, of replay rows
Objective = Literal["dpo", "orpo", "kto"]


@dataclass(frozen=True)
class Preferences:
    """All that a run trains on; `replay` holds the model to the base."""

    objective: Objective
    units: Sequence[Unit]
    replay: Sequence[Example]


class PreferenceTrainer(Trainer):
    """Steps of units and replay rows, made into tensors as they come."""

    def __init__(
        self, *, spec: TrainSpec, data: Preferences, plan: list[Step], pad_id: int, amp: Amp, **rest: Any
    ) -> None:
        self._spec, self._data, self._plan, self._pad_id, self._amp = spec, data, plan, pad_id, amp
        self._weights = kto_weights(data.units) if data.objective == "kto" else (1.0, 1.0)
        self.margins: list[float] = []
        super().__init__(**rest)

    def get_train_dataloader(self) -> DataLoader[Any]:
        steps = [[number] for number in range(len(self._plan))]
        return DataLoader(
            range(len(self._plan)), batch_sampler=steps, collate_fn=lambda one: self._batch(*self._plan[one[0]])
        )

    def _batch(self, unit_numbers: list[int], replay_numbers: list[int]) -> dict[str, Any]:
        """`rows`: all chosen ones, then all rejected ones; or the thumbs. Parts that a step lacks are not there."""
        units = [self._data.units[number] for number in unit_numbers]
        parts: dict[str, list[Example]] = {"held": [self._data.replay[number] for number in replay_numbers]}
        batch: dict[str, Any] = {}
        if self._data.objective == "kto":
            parts |= {"rows": [unit.rows[0] for unit in units]}
            parts |= {"mismatched": mismatched(units, self._spec.lengths.max_length) if units else []}
            batch["good"] = torch.tensor([bool(unit.good) for unit in units])
        else:
            parts["rows"] = [unit.rows[side] for side in (0, 1) for unit in units]
        made = {name: Padded.of(rows, self._pad_id)._asdict() for name, rows in parts.items() if rows}
        return {**batch, **made}

    def compute_loss(
        self, model: Any, inputs: Mapping[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> torch.Tensor:
        rows = {name: Padded(**inputs[name]) for name in ("rows", "mismatched", "held") if name in inputs}
        loss = torch.zeros((), device=model.device)
        if "rows" in rows:
            loss = loss + self._preference_loss(model, rows, inputs.get("good"))
        if "held" in rows:
            loss = loss + self._held(model, rows["held"])
        if not torch.isfinite(loss):
            raise Diverged(
                f"the loss became {loss.item()} at step {self.state.global_step + 1} of {self._data.objective}",
                hint="Lower trainer.preference_learning_rate, or look for broken rows in this night's delta.",
            )
        return loss

    def _held(self, model: Any, rows: Padded) -> torch.Tensor:
        if self._spec.schedule.replay_loss == "ce":
            return cross_entropy(score(model, rows, self._amp))
        return self._spec.schedule.kl_weight * held_loss(model, rows, self._amp)

    def _preference_loss(self, model: Any, rows: dict[str, Padded], good: torch.Tensor | None) -> torch.Tensor:
        """The base first: what it says has no gradient and is let go of before the adapter's states are kept."""
        beta = self._spec.preference.beta
        if good is not None:
            with torch.no_grad():
                drift = (
                    score(model, rows["mismatched"], self._amp).sums
                    - score_base(model, rows["mismatched"], self._amp).sums
                )
            base = score_base(model, rows["rows"], self._amp).sums
            return kto_loss(score(model, rows["rows"], self._amp).sums - base, good, drift, beta, self._weights)
        pairs = len(rows["rows"].input_ids) // 2
        base = None if self._data.objective == "orpo" else score_base(model, rows["rows"], self._amp).sums
        scored = score(model, rows["rows"], self._amp)
        chosen, rejected = Scored(*(s[:pairs] for s in scored)), Scored(*(s[pairs:] for s in scored))
        self.margins.append((chosen.sums - rejected.sums).mean().item())
        if base is None:
            return orpo_loss(chosen, rejected, beta)
        return dpo_loss(chosen.sums, rejected.sums, (base[:pairs], base[pairs:]), beta)

    def try_heaviest(self) -> None:
        """The step that needs most memory goes first, without an update: out of memory shows in the first minute."""
        batch = self._batch(*max(self._plan, key=self._weight))
        self.model.train()
        self.compute_loss(self.model, self._prepare_inputs(batch)).backward()
        self.model.zero_grad()
        self.margins.clear()

    def with_margin(self, progress: Progress) -> Progress:
        return progress.model_copy(update={"margin": self.margins[-1] if self.margins else None})

    def _weight(self, step: Step) -> int:
        rows = [row for unit in step[0] for row in self._data.units[unit].rows] + [
            self._data.replay[n] for n in step[1]
        ]
        return len(rows) * max(len(row.tokens) for row in rows)


def train_preferences(
    spec: TrainSpec, model: Any, tokenizer: Any, data: Preferences, run_digest: str, channel: Channel
) -> Trained:
    """As `run_planned`: to the end of the plan or of the time, from a checkpoint where there is one."""
    schedule = spec.schedule.model_copy(update={"learning_rate": spec.preference.learning_rate})
    spec = spec.model_copy(update={"schedule": schedule})
    plan = plan_units(data.units, data.replay, schedule, spec.seed)
    tokens = [step_tokens(data, step) for step in plan]
    single_precision(model)
    optimizer = optimizer_of(model, schedule)
    trainer = PreferenceTrainer(
        spec=spec,
        data=data,
        plan=plan,
        pad_id=tokenizer.pad_token_id or 0,
        amp=Amp(model.device.type, compute_dtype()),
        model=model,
        args=arguments(spec, len(plan)),
        train_dataset=plan,
        processing_class=tokenizer,
        optimizers=(optimizer, scheduler_of(optimizer, schedule, len(plan))),
    )
    trainer.try_heaviest()
    trained = run_planned(trainer, spec, model, tokens, run_digest, Relay(channel, trainer.with_margin))
    margins = trainer.margins[-LAST_STEPS:]
    return replace(trained, final_margin=sum(margins) / len(margins) if margins else None)


def step_tokens(data: Preferences, step: Step) -> int:
    units, replay = step
    return sum(data.units[n].tokens for n in units) + sum(len(data.replay[n].tokens) for n in replay)
