"""What a method trains, in which order: one phase, or supervised fine-tuning before preferences.

A finished phase leaves its weights and, last, a marker: a killed run goes on in the phase where it stood. Of several
ranks the first writes and reads it, for all.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, get_args

import torch
from peft import get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import load_file, save

from loop.digests import write_durably
from loop.heaviest_step import RowSize, heaviest_step
from loop.memory_estimate import Workload
from loop.methods import shows_answers
from loop.trainers.checkpoints import CHECKPOINTS, phase_folder
from loop.trainers.memory import RunMemory
from loop.trainers.planned_run import Trained, single_precision
from loop.trainers.preference_loop import step_tokens, train_preferences
from loop.trainers.preference_parts import Objective, Preferences
from loop.trainers.preference_rows import Unit, pair_units, plan_units, read_pairs, read_thumbs, thumb_units
from loop.trainers.progress import Channel, Relay
from loop.trainers.rows import Example, plan_examples
from loop.trainers.sft_loop import train
from loop.trainers.spec import BadRows, Progress, TrainSpec
from loop.trainers.team import team

WEIGHTS, MARKER = "adapter_state.safetensors", "finished.json"


@dataclass(frozen=True)
class Data:
    """Tokenised: the rows of train.jsonl (labels and replay), and the units that the method needs."""

    rows: Sequence[Example]
    units: Sequence[Unit] = ()

    @property
    def longest(self) -> int:
        """Tokens."""
        return max(len(row.tokens) for row in (*self.rows, *self._unit_rows()))

    @property
    def examples(self) -> int:
        return len(self.rows) + len(self.units)

    def heaviest(self, spec: TrainSpec) -> Workload:
        """Of all steps."""
        rows, preferences = ([_size(row) for row in some] for some in (self.rows, self._unit_rows()))
        return heaviest_step(spec, rows, preferences)

    def _unit_rows(self) -> list[Example]:
        return [row for unit in self.units for row in unit.rows]


def _size(row: Example) -> RowSize:
    return RowSize(len(row.tokens), len(row.tokens) - row.answer_start, row.replay)


@dataclass(frozen=True)
class Phase:
    objective: str  # sft, dpo, orpo or kto
    steps: int
    tokens: int  # of all steps, padding not counted


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
    planned = []
    if shows_answers(spec.method, corrections=any(not row.replay for row in data.rows)):
        _, tokens = plan_examples(data.rows, spec.schedule, spec.seed)
        planned.append(Phase("sft", len(tokens), sum(tokens)))
    if spec.method != "sft":
        preferences = _preferences(spec.method.rpartition("+")[2], data)
        plan = plan_units(data.units, preferences.replay, spec.schedule, spec.seed)
        tokens = [step_tokens(preferences, step) for step in plan]
        planned.append(Phase(preferences.objective, len(tokens), sum(tokens)))
    return planned


def _preferences(name: str, data: Data) -> Preferences:
    objective: Objective = next(known for known in get_args(Objective) if known == name)
    return Preferences(objective, data.units, [row for row in data.rows if row.replay])


def train_phases(
    spec: TrainSpec,
    model: Any,
    tokenizer: Any,
    data: Data,
    run_digest: str,
    channel: Channel,
    memory: RunMemory | None = None,
) -> Trained:
    """The last phase's outcome; steps, tokens and seconds are of all. `memory`: its plan is one for all of them."""
    planned = phases(spec, data)
    total = sum(phase.steps for phase in planned)
    done: list[Trained] = []
    for number, phase in enumerate(planned):
        last = number == len(planned) - 1
        before = sum(one.steps for one in planned[:number])
        (elapsed,) = team().agree((channel.elapsed_seconds(),))  # no clock is quite another's
        own = _phase_spec(spec, planned, number, elapsed)
        trained = None if last else _finished(own.out_dir, run_digest, model)
        if trained is None:
            told = Relay(channel, partial(_counted, phase=phase, before=before, total=total))
            own = memory.settled(own) if memory else own  # an earlier phase may have lowered it
            trained = _train(own, phase, model, tokenizer, data, run_digest, told, memory)
        if not last:
            if team().leads:
                _finish(own.out_dir, run_digest, trained)
            team().wait()
        done.append(trained)
    return replace(
        done[-1],
        steps=sum(one.steps for one in done),
        tokens=sum(one.tokens for one in done),
        seconds=round(sum(one.seconds for one in done), 3),
        planned_steps=total,
        time_limited=any(one.time_limited for one in done),
        peak_memory_bytes=max(one.peak_memory_bytes for one in done),
    )


def _train(
    spec: TrainSpec,
    phase: Phase,
    model: Any,
    tokenizer: Any,
    data: Data,
    run_digest: str,
    channel: Channel,
    memory: RunMemory | None,
) -> Trained:
    if phase.objective == "sft":
        return train(spec, model, tokenizer, list(data.rows), run_digest, channel, memory)
    return train_preferences(spec, model, tokenizer, _preferences(phase.objective, data), run_digest, channel, memory)


def _phase_spec(spec: TrainSpec, planned: Sequence[Phase], number: int, elapsed: float) -> TrainSpec:
    """Each phase keeps its checkpoints apart; only the last one finishes on the served base, and has all of the time.

    An earlier one may take as much of the time that is left as it has of the tokens that are left.
    """
    if len(planned) == 1:
        return spec
    before = sum(phase.steps for phase in planned[:number])
    out_dir = phase_folder(spec.out_dir, before, planned[number].objective)
    if number == len(planned) - 1:
        return spec.model_copy(update={"out_dir": out_dir})
    limits = spec.limits
    if limits.seconds is not None:
        share = planned[number].tokens / sum(phase.tokens for phase in planned[number:])
        limits = limits.model_copy(update={"seconds": elapsed + share * max(limits.seconds - elapsed, 0.0)})
    schedule = spec.schedule.model_copy(update={"finish_share": 0.0})
    return spec.model_copy(update={"schedule": schedule, "out_dir": out_dir, "limits": limits})


def _finish(folder: Path, run_digest: str, trained: Trained) -> None:
    """In float32, as it was trained; then the marker, then the checkpoints may go."""
    weights = {
        name: weight.detach().cpu().contiguous() for name, weight in get_peft_model_state_dict(trained.model).items()
    }
    folder.mkdir(parents=True, exist_ok=True)
    write_durably(folder / WEIGHTS, save(weights))
    told = {name: value for name, value in vars(trained).items() if isinstance(value, int | float | str)}
    write_durably(folder / MARKER, json.dumps({"run_digest": run_digest, "trained": told}).encode())
    shutil.rmtree(folder / CHECKPOINTS, ignore_errors=True)


def _finished(folder: Path, run_digest: str, model: Any) -> Trained | None:
    """What the phase left, its weights in `model`; None where it has not finished, or only for other rows."""
    path = folder / MARKER
    told = team().words(path.read_text(encoding="utf-8") if team().leads and path.exists() else "")
    if not told or (marker := json.loads(told))["run_digest"] != run_digest:
        return None
    put_weights(model, folder / WEIGHTS)
    return Trained(model=model, **marker["trained"])


def put_weights(model: Any, path: Path) -> None:
    """An adapter's weights into the model's own, in float32."""
    weights = {name: weight.float() for name, weight in load_file(path).items()}
    single_precision(model)
    with torch.no_grad():
        set_peft_model_state_dict(model, weights)


def _counted(progress: Progress, phase: Phase, before: int, total: int) -> Progress:
    """Steps and time left of all phases: the later ones at the speed of this one."""
    step, here = progress.step + before, progress.total_steps - progress.step
    seconds = progress.seconds_left
    if total > before + progress.total_steps:
        seconds = None if seconds is None or not here else round(seconds * (total - step) / here, 1)
    counted = {"step": step, "total_steps": total, "seconds_left": seconds, "objective": phase.objective}
    return progress.model_copy(update=counted)
