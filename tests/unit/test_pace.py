"""A schedule that is fitted into the time allowed, and one that need not be."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.optim.lr_scheduler import OneCycleLR
from transformers import get_scheduler

from loop.trainers.pace import Pace, factor
from loop.trainers.spec import ScheduleSpec


def run(pace: Pace, seconds: list[float], started: float = 5.0) -> list[float]:
    """Steps that take so many seconds each; the factor of the rate that each was made with (-1: the plan's own)."""
    at, factors = started, []
    for step, took in enumerate(seconds, 1):
        pace.begin_step(at)
        planned = pace.rate_factor()
        factors.append(-1.0 if planned is None else planned)
        at += took
        pace.end_step(step, at)
        if pace.ended:
            break
    return factors


def test_where_time_suffices_nothing_is_touched() -> None:
    """The plan's own rate, every step, and no word of a limit."""
    pace = Pace(ScheduleSpec(), 100, seconds_allowed=300)
    assert run(pace, [1.0] * 100) == [-1.0] * 100
    assert not pace.limited
    assert run(Pace(ScheduleSpec(), 100, None), [1000.0] * 100) == [-1.0] * 100


@pytest.mark.parametrize("scheduler", ["linear", "cosine", "one_cycle", "constant"])
def test_a_run_that_is_short_of_time_ends_in_time_with_its_rate_down(scheduler: str) -> None:
    """1,000 steps of a second planned, 200 s given: about 190 steps, the rate falls evenly to nearly nothing."""
    pace = Pace(ScheduleSpec.model_validate({"scheduler": scheduler}), 1000, seconds_allowed=200)
    factors = run(pace, [1.0] * 1000)
    assert pace.limited
    assert pace.ended
    assert 180 <= len(factors) <= 195
    assert factors[-1] < 0.1
    falling = factors[len(factors) // 2 :]
    assert falling == sorted(falling, reverse=True)
    assert max(factors) > 0.9


def test_the_rate_follows_a_speed_that_changes() -> None:
    """Half way it gets three times as slow: fewer steps, and still no jump and a low end."""
    pace = Pace(ScheduleSpec(warmup_share=0), 1000, seconds_allowed=300)
    factors = run(pace, [1.0] * 150 + [3.0] * 850)
    assert pace.ended
    assert 180 <= len(factors) <= 200
    steps = [abs(before - after) for before, after in pairwise(factors[10:])]
    assert max(steps) < 0.06
    assert factors[-1] < 0.1


def test_a_pause_does_not_count_as_speed() -> None:
    """One step that took a minute, because production needed the machine: the median does not move."""
    pace = Pace(ScheduleSpec(), 100, seconds_allowed=300)
    run(pace, [1.0] * 40 + [60.0] + [1.0] * 59)
    assert not pace.limited


def test_one_slow_step_is_enough_when_it_takes_all_the_time() -> None:
    """Too slow even to be measured: it ends after the step that goes over."""
    pace = Pace(ScheduleSpec(), 100, seconds_allowed=50)
    assert len(run(pace, [40.0] * 100)) == 2
    assert pace.limited


def test_a_checkpoint_keeps_how_far_the_plan_was(tmp_path: Path) -> None:
    """A run that was short of time goes on where it was, not at the plan's higher rate."""
    pace = Pace(ScheduleSpec(), 1000, seconds_allowed=200)
    run(pace, [1.0] * 100)
    pace.keep(tmp_path)
    again = Pace(ScheduleSpec(), 1000, seconds_allowed=200)
    again.take_up(tmp_path)
    assert again.done == pytest.approx(pace.done)
    assert again.rate_factor() == pytest.approx(pace.rate_factor())
    untouched = Pace(ScheduleSpec(), 1000)
    untouched.take_up(tmp_path / "nowhere")
    assert untouched.rate_factor() is None


@given(
    name=st.sampled_from(["linear", "cosine", "one_cycle"]),
    steps=st.integers(10, 300),
    warmup=st.floats(0.05, 0.5),
    at=st.floats(0, 0.99),
)
def test_the_curves_are_those_of_the_libraries(name: str, steps: int, warmup: float, at: float) -> None:
    """At a whole step, the factor is what transformers' or torch's schedule gives there."""
    step = int(at * steps)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    schedule = ScheduleSpec.model_validate({"scheduler": name, "warmup_share": warmup})
    if name == "one_cycle":
        share = min(max(warmup, 2 / steps), 1 - 1 / steps)
        library = OneCycleLR(optimizer, max_lr=1.0, total_steps=steps, pct_start=share)
    else:
        library = get_scheduler(name, optimizer, int(warmup * steps), steps)
    for _ in range(step):
        optimizer.step()
        library.step()
    assert factor(schedule, steps, step / steps) == pytest.approx(library.get_last_lr()[0], abs=1e-5)


def test_time_left_is_told_once_the_speed_is_known() -> None:
    pace = Pace(ScheduleSpec(), 100, None)
    assert pace.seconds_left(1) is None
    run(pace, [2.0] * 50)
    assert pace.seconds_left(50) == 100
