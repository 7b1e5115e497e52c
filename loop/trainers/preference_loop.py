"""Training on pairs (dpo, orpo) and on thumbs (kto): transformers' trainer with our losses, batches and checkpoints.

What is trained is settled beforehand by `plan_units`, replay rows in every batch. The schedule, the checkpoints, the
finish on the served base and the progress lines are those of `planned_run`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch.utils.data import DataLoader
from transformers import Trainer

from loop.trainers.checkpointing import ready
from loop.trainers.loss import Amp
from loop.trainers.memory import RunMemory
from loop.trainers.planned_run import (
    LAST_STEPS,
    Diverged,
    Trained,
    compute_dtype,
    own_chance,
    run_planned,
    single_precision,
)
from loop.trainers.preference_loss import (
    Scored,
    cross_entropy,
    dpo_loss,
    held_loss,
    kto_loss,
    orpo_loss,
    score,
    score_base,
)
from loop.trainers.preference_parts import DriftPart, PreferencePart, PreferenceParts, Preferences, Step, StepParts
from loop.trainers.preference_rows import kto_weights, plan_units
from loop.trainers.progress import Channel, Relay
from loop.trainers.room import find_room
from loop.trainers.sft_loop import arguments, optimizer_of, scheduler_of
from loop.trainers.spec import Progress, TrainSpec
from loop.trainers.team import team


class PreferenceTrainer(Trainer):
    """Steps of units and replay rows, a part at a time, made into tensors as they come."""

    def __init__(self, *, spec: TrainSpec, plan: list[Step], parts: PreferenceParts, amp: Amp, **rest: Any) -> None:
        self._spec, self._plan, self._parts, self._amp = spec, plan, parts, amp
        self._data, self._team = parts.data, team()
        self._weights = kto_weights(self._data.units) if self._data.objective == "kto" else (1.0, 1.0)
        self.margins: list[float] = []
        super().__init__(**rest)

    def get_train_dataloader(self) -> DataLoader[Any]:
        steps = [[number] for number in range(len(self._plan))]
        return DataLoader(range(len(self._plan)), batch_sampler=steps, collate_fn=self._collate)

    def _collate(self, one: list[int]) -> dict[str, StepParts]:
        return {"step": self._parts(self._plan[one[0]], self._team)}

    def training_step(
        self, model: Any, inputs: Mapping[str, StepParts], num_items_in_batch: Any = None
    ) -> torch.Tensor:
        own_chance(self._spec, self.state.global_step)
        return self._train_on(model, inputs["step"])

    def _train_on(self, model: Any, step: StepParts) -> torch.Tensor:
        if not model.training:
            ready(model)
        own = torch.zeros(2, device=model.device)
        for loss, margin in self.losses(model, step):
            self.accelerator.backward(loss)
            own += torch.stack([loss.detach(), margin])
        weights = [weight for weight in model.parameters() if weight.requires_grad]
        total, margin = self._team.sum_gradients(weights, own)
        if step.units and self._data.objective != "kto":
            self.margins.append(margin.item())
        return total

    def losses(self, model: Any, step: StepParts) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Each part's, and its share of the step's mean margin; over all ranks they add up to the step's. A part goes
        through the model when its loss is asked for."""
        drift = self._drift(model, step)
        for part in (made.to(model.device) for made in step.parts):
            loss, margin = self._of_part(model, part, drift)
            if not torch.isfinite(loss):
                raise Diverged(
                    f"the loss became {loss.item()} at step {self.state.global_step + 1} of {self._data.objective}",
                    hint="Lower trainer.preference_learning_rate, or look for broken rows in this night's delta.",
                )
            yield loss, margin

    def _of_part(self, model: Any, part: PreferencePart, drift: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        none = torch.zeros((), device=model.device)
        if part.held:
            return self._held(model, part), none
        if part.good is not None:
            return self._of_thumbs(model, part, part.good, drift), none
        return self._of_pairs(model, part)

    def _held(self, model: Any, part: PreferencePart) -> torch.Tensor:
        if self._spec.schedule.replay_loss == "ce":
            return part.of_tokens * cross_entropy(score(model, part.rows, self._amp))
        return part.of_tokens * self._spec.schedule.kl_weight * held_loss(model, part.rows, self._amp)

    def _drift(self, model: Any, step: StepParts) -> torch.Tensor:
        """Of all ranks' mismatched rows from the base, the mean in nats; 0 where the step has none."""
        found = torch.zeros((), device=model.device)
        if self._data.objective != "kto" or not step.units:
            return found
        with torch.no_grad():
            for part in step.drift:
                found += part.of_rows * self._moved(model, part)
        return self._team.sum(found)

    def _moved(self, model: Any, part: DriftPart) -> torch.Tensor:
        rows = part.rows.to(model.device)
        own = score(model, rows, self._amp).sums
        return (own - score_base(model, rows, self._amp).sums).mean()

    def _of_thumbs(self, model: Any, part: PreferencePart, good: torch.Tensor, drift: torch.Tensor) -> torch.Tensor:
        """The base first: what it says has no gradient and is let go of before the adapter's states are kept."""
        base = score_base(model, part.rows, self._amp).sums
        gains = score(model, part.rows, self._amp).sums - base
        return part.of_units * kto_loss(gains, good, drift, self._spec.preference.beta, self._weights)

    def _of_pairs(self, model: Any, part: PreferencePart) -> tuple[torch.Tensor, torch.Tensor]:
        """Loss and margin; the base first, as with thumbs."""
        beta, rows = self._spec.preference.beta, part.rows
        base = None if self._data.objective == "orpo" else score_base(model, rows, self._amp).sums
        scored = score(model, rows, self._amp)
        pairs = len(rows.input_ids) // 2
        chosen, rejected = Scored(*(s[:pairs] for s in scored)), Scored(*(s[pairs:] for s in scored))
        margin = part.of_units * (chosen.sums - rejected.sums).mean().detach()
        if base is None:
            return orpo_loss(chosen, rejected, beta, of_tokens=part.of_tokens, of_pairs=part.of_units), margin
        return part.of_units * dpo_loss(chosen.sums, rejected.sums, (base[:pairs], base[pairs:]), beta), margin

    def _save_checkpoint(self, *arguments: Any, **named: Any) -> None:
        """Adapter and optimizer are the same on every rank."""
        if self._team.leads:
            super()._save_checkpoint(*arguments, **named)

    def try_heaviest(self) -> None:
        """Of all ranks, by each of them: all pass through the model as often."""
        self._try(self._parts.heaviest(self._plan, self._team.size))

    def try_shortest(self) -> None:
        units = self._data.units
        self._try(([min(range(len(units)), key=lambda number: units[number].tokens)], []))

    def _try(self, step: Step) -> None:
        self._train_on(self.model, self._parts(step))
        self.model.zero_grad()
        self.margins.clear()

    def train_at_once(self, tokens: int) -> None:
        self._parts = replace(self._parts, at_once=tokens)

    def with_margin(self, progress: Progress) -> Progress:
        return progress.model_copy(update={"margin": self.margins[-1] if self.margins else None})


def train_preferences(
    spec: TrainSpec,
    model: Any,
    tokenizer: Any,
    data: Preferences,
    run_digest: str,
    channel: Channel,
    memory: RunMemory | None = None,
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
        plan=plan,
        parts=PreferenceParts(data, tokenizer.pad_token_id or 0, spec.lengths.max_length, spec.lengths.at_once),
        amp=Amp(model.device.type, compute_dtype()),
        model=model,
        args=arguments(spec, len(plan)),
        train_dataset=plan,
        processing_class=tokenizer,
        optimizers=(optimizer, scheduler_of(optimizer, schedule, len(plan))),
    )
    find_room(trainer, spec.memory.checkpointing, memory)
    told, room = Relay(channel, trainer.with_margin), memory.room if memory else None
    trained = run_planned(trainer, spec, model, tokens, run_digest, told, room=room)
    margins = trainer.margins[-LAST_STEPS:]
    return replace(trained, final_margin=sum(margins) / len(margins) if margins else None)


def step_tokens(data: Preferences, step: Step) -> int:
    units, replay = step
    return sum(data.units[n].tokens for n in units) + sum(len(data.replay[n].tokens) for n in replay)
