"""A method of two phases: who gets which time and folder, and how its steps are told."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from loop.trainers.phases import Data, Phase, _counted, _phase_spec, phases
from loop.trainers.preference_rows import Unit
from loop.trainers.rows import Example
from loop.trainers.spec import LimitsSpec, Progress, TrainSpec

PLANNED = [Phase("sft", 80, 30_000), Phase("dpo", 40, 10_000)]


def _spec(folder: Path, **changed: Any) -> TrainSpec:
    fields = {"base_dir": folder, "base_name": "b", "base_digest": "sha256:0", "data_dir": folder, "out_dir": folder}
    return TrainSpec.model_validate({**fields, "schedule": {"finish_share": 0.25}, **changed})


def test_the_first_phase_leaves_the_second_its_share_of_the_time(tmp_path: Path) -> None:
    """1,000 seconds from the start of the process, 100 of them gone with loading: by tokens, 3 of 4 parts."""
    spec = _spec(tmp_path, limits={"seconds": 1000, "save_minutes": 5})
    first, second = (_phase_spec(spec, PLANNED, number, 100.0) for number in (0, 1))
    assert first.limits == LimitsSpec(seconds=775, save_minutes=5)
    assert second.limits == spec.limits, "all that is left, also what the first one did not need"
    assert (first.schedule.finish_share, second.schedule.finish_share) == (0, 0.25)
    assert {path.name for path in (first.out_dir, second.out_dir)} == {"phase-0-sft", "phase-80-dpo"}


def test_without_a_limit_or_a_second_phase_nothing_is_shared(tmp_path: Path) -> None:
    assert _phase_spec(_spec(tmp_path), PLANNED, 0, 100.0).limits.seconds is None
    spec = _spec(tmp_path, limits={"seconds": 1000})
    assert _phase_spec(spec, PLANNED[:1], 0, 100.0) == spec


@pytest.mark.parametrize(("method", "expected"), [("dpo", ["dpo"]), ("sft+dpo", ["sft", "dpo"]), ("sft", ["sft"])])
def test_a_phases_tokens_are_those_of_its_steps(tmp_path: Path, method: str, expected: list[str]) -> None:
    """Rows of 4 tokens, two a step; pairs of 4 + 6, one a step; four epochs of two."""
    rows = [Example(str(n), (1, 2, 3, 4), 2, replay=False) for n in range(2)]
    pairs = [Unit(str(n), (rows[n], Example("r", (1, 2, 3, 4, 5, 6), 2, replay=False))) for n in range(2)]
    spec = _spec(tmp_path, method=method, schedule={"batch_size": 2, "epochs": 4, "replay_share": 0.0})
    planned = phases(spec, Data(rows, pairs if method != "sft" else ()))
    sizes = {"sft": Phase("sft", 4, 32), "dpo": Phase("dpo", 8, 80)}
    assert planned == [sizes[name] for name in expected]


def _line(step: int, seconds_left: float | None) -> Progress:
    rest = {"loss": 1.0, "grad_norm": 1.0, "learning_rate": 1.0, "tokens_per_s": 1.0, "memory_bytes": 1, "elapsed_s": 1}
    return Progress.model_validate({"step": step, "total_steps": 40, "seconds_left": seconds_left, **rest})


def test_steps_and_the_time_left_are_of_all_phases(tmp_path: Path) -> None:
    """At step 30 of a first phase of 40, ten steps take 20 s: the 120 after them take 240 more."""
    told = _counted(_line(30, 20.0), Phase("sft", 40, 1), 0, 160)
    assert (told.step, told.total_steps, told.seconds_left, told.objective) == (30, 160, 260.0, "sft")
    assert _counted(_line(40, 0.0), Phase("sft", 40, 1), 0, 160).seconds_left is None, "not yet known"
    last = _counted(_line(40, 0.0), Phase("dpo", 40, 1), 120, 160)
    assert (last.step, last.seconds_left) == (160, 0.0)
