"""What a method trains, in which order: one phase, or supervised fine-tuning before preferences.

A finished phase leaves its weights and, last, a marker: a killed run goes on in the phase where it stood.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from peft import get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import load_file, save

from loop.digests import write_durably
from loop.trainers.preference_loop import Objective, Preferences, train_preferences
from loop.trainers.preference_rows import Unit, pair_units, plan_units, read_pairs, read_thumbs, thumb_units
from loop.trainers.progress import Channel
from loop.trainers.rows import Example, plan_batches
from loop.trainers.sft_loop import Trained, train
from loop.trainers.spec import BadRows, Progress, TrainSpec

WEIGHTS, MARKER = "adapter_state.safetensors", "finished.json"


@dataclass(frozen=True)
class Data:
    """Tokenised: the rows of train.jsonl (labels and replay), and the units that the method needs."""

    rows: Sequence[Example]
    units: Sequence[Unit] = ()

    @property
    def longest(self) -> int:
        """Tokens."""
        return max(len(row.tokens) for row in (*self.rows, *(row for unit in self.units for row in unit.rows)))

    @property
    def examples(self) -> int:
        return len(self.rows) + len(self.units)


@dataclass(frozen=True)
class Phase:
    objective: str  # sft, dpo, orpo or kto
    steps: int


def preference_units(spec: TrainSpec, tokenizer: Any, stop_ids: frozenset[int]) -> list[Unit]:
    """Of the method's kind; none for sft."""
    if spec.method == "sft":
        return []
    length = spec.lengths.max_length
    if spec.method == "kto":
        units = thumb_units(read_thumbs(spec.data_dir), tokenizer, stop_ids, length)
    else:
        units = pair_units(read_pairs(spec.data_dir), tokenizer, stop_ids, length)
    if not units:
        what = "thumbs" if spec.method == "kto" else "pairs"
        raise BadRows(f"{spec.data_dir} holds no {what}, which method {spec.method!r} trains on")
    return units


def phases(spec: TrainSpec, data: Data) -> list[Phase]:
    """kto is preceded by sft where there are corrections: thumbs say nothing of them, and they would be forgotten."""
    labels = any(not row.replay for row in data.rows)
    supervised = Phase("sft", len(_sft_plan(spec, data)))
    if spec.method == "sft":
        return [supervised]
    objective = spec.method.rpartition("+")[2]
    preferring = Phase(objective, len(plan_units(data.units, _replay(data), spec.schedule, spec.seed)))
    return [supervised, preferring] if spec.method == "sft+dpo" or (objective == "kto" and labels) else [preferring]


def train_phases(spec: TrainSpec, model: Any, tokenizer: Any, data: Data, run_digest: str, channel: Channel) -> Trained:
    """The last phase's outcome; steps, tokens and seconds are of all."""
    planned = phases(spec, data)
    total = sum(phase.steps for phase in planned)
    done: list[Trained] = []
    for number, phase in enumerate(planned):
        last = number == len(planned) - 1
        own = _phase_spec(spec, phase, alone=len(planned) == 1, last=last)
        trained = None if last else _finished(own.out_dir, run_digest, model)
        if trained is None:
            told = _Offset(channel, sum(before.steps for before in planned[:number]), total)
            trained = _train(own, phase, model, tokenizer, data, run_digest, told)
        if not last:
            _finish(own.out_dir, run_digest, trained)
        done.append(trained)
    return replace(
        done[-1],
        steps=sum(one.steps for one in done),
        tokens=sum(one.tokens for one in done),
        seconds=round(sum(one.seconds for one in done), 3),
        peak_memory_bytes=max(one.peak_memory_bytes for one in done),
    )


def _train(
    spec: TrainSpec, phase: Phase, model: Any, tokenizer: Any, data: Data, run_digest: str, channel: Channel
) -> Trained:
    if phase.objective == "sft":
        return train(spec, model, tokenizer, list(data.rows), run_digest, channel)
    objective: Objective = next(known for known in ("dpo", "orpo", "kto") if known == phase.objective)
    preferences = Preferences(objective, data.units, _replay(data))
    return train_preferences(spec, model, tokenizer, preferences, run_digest, channel)


def _phase_spec(spec: TrainSpec, phase: Phase, *, alone: bool, last: bool) -> TrainSpec:
    """Each phase keeps its checkpoints apart; only the last one finishes on the served base."""
    schedule = spec.schedule if last else spec.schedule.model_copy(update={"finish_share": 0.0})
    out_dir = spec.out_dir if alone else spec.out_dir / f"phase-{phase.objective}"
    return spec.model_copy(update={"schedule": schedule, "out_dir": out_dir})


def _replay(data: Data) -> list[Example]:
    return [row for row in data.rows if row.replay]


def _sft_plan(spec: TrainSpec, data: Data) -> list[list[int]]:
    lengths = [len(row.tokens) for row in data.rows]
    return plan_batches(lengths, spec.schedule, spec.seed, [row.replay for row in data.rows]) if lengths else []


def _finish(folder: Path, run_digest: str, trained: Trained) -> None:
    """In float32, as it was trained; then the marker, then the checkpoints may go."""
    weights = {
        name: weight.detach().cpu().contiguous() for name, weight in get_peft_model_state_dict(trained.model).items()
    }
    folder.mkdir(parents=True, exist_ok=True)
    write_durably(folder / WEIGHTS, save(weights))
    told = {name: value for name, value in vars(trained).items() if isinstance(value, int | float | str)}
    write_durably(folder / MARKER, json.dumps({"run_digest": run_digest, "trained": told}).encode())
    shutil.rmtree(folder / "checkpoints", ignore_errors=True)


def _finished(folder: Path, run_digest: str, model: Any) -> Trained | None:
    """What the phase left, its weights in `model`; None where it has not finished, or only for other rows."""
    if not (folder / MARKER).exists():
        return None
    marker = json.loads((folder / MARKER).read_text(encoding="utf-8"))
    if marker["run_digest"] != run_digest:
        return None
    put_weights(model, folder / WEIGHTS)
    return Trained(model=model, **marker["trained"])


def put_weights(model: Any, path: Path) -> None:
    """An adapter's weights into the model's own, in float32."""
    weights = {name: weight.float() for name, weight in load_file(path).items()}
    for weight in model.parameters():
        if weight.requires_grad:
            weight.data = weight.data.float()
    with torch.no_grad():
        set_peft_model_state_dict(model, weights)


class _Offset(Channel):
    """Steps counted over all phases."""

    def __init__(self, channel: Channel, before: int, total: int) -> None:
        self._channel, self._before, self._total = channel, before, total

    def step(self, progress: Progress) -> None:
        counted = {"step": progress.step + self._before, "total_steps": self._total}
        self._channel.step(progress.model_copy(update=counted))

    def elapsed_seconds(self) -> float:
        return self._channel.elapsed_seconds()
