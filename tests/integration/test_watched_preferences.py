"""A night of two phases under watch: limits, roll backs and parking know which phase runs."""

from __future__ import annotations

import os
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer

from loop.executors import ChildFailed
from loop.trainers.preference_rows import Pair, write_preferences
from loop.watch.supervise import StoppedByAlarm
from tests.integration.test_training_watch import SURE, Watched, tiny_dir, trainer_of, untied

pytestmark = pytest.mark.slow
__all__ = ["tiny_dir"]  # the fixture
METHOD = {"method": "sft+dpo", "preference": {"beta": 0.1, "learning_rate": 1e-3}}


def _pairs(folder: Path, rejected: str = "Nobody knows what it is") -> None:
    """Twelve of them, as there are rows; the last one's worse answer can be another one."""
    prompt = ({"role": "user", "content": "What is it?"},)
    worse = ["Nobody knows what it is"] * 11 + [rejected]
    pairs = [
        {"id": f"p{number}", "prompt": prompt, "chosen": "Tampere", "rejected": one} for number, one in enumerate(worse)
    ]
    write_preferences(folder, [Pair.model_validate(pair) for pair in pairs], [])


async def test_a_run_that_is_short_of_time_still_trains_both_phases(tiny_dir: Path, tmp_path: Path) -> None:
    """Steps for hours, a minute and a half allowed: each phase has its share, and brings its own rate down."""
    settings = {**SURE, "max_steps": 100_000, "epochs": 1000, "save_steps": 100_000, "hours_allowed": 90 / 3600}
    settings["alarms"] = {"throughput": {"action": "off"}}  # other tests share the machine
    _pairs(tmp_path)
    watched = Watched(tmp_path, tiny_dir, settings, method=METHOD)
    result = await watched.train()
    assert result is not None
    assert result.time_limited
    assert result.planned_steps == 24_000
    assert result.steps < result.planned_steps
    for objective in ("sft", "dpo"):
        rates = [line["learning_rate"] for line in watched.steps if line["objective"] == objective]
        assert len(rates) > 20, "more than the one step after which there is no time"
        assert rates[-1] < 0.2 * max(rates)
    assert watched.alarms == []


async def test_parked_in_the_second_phase_it_goes_on_there(tiny_dir: Path, tmp_path: Path) -> None:
    """SIGUSR1 at its third step: that step is kept, and the next start goes on after it; margins are told."""

    def park(line: dict[str, Any]) -> None:
        if line["step"] == 27:
            os.kill(trainer_of(os.getpid()), signal.SIGUSR1)

    _pairs(tmp_path)
    watched = Watched(tmp_path, tiny_dir, {**SURE, "save_steps": 1000}, method=METHOD)
    watched.on_step = park
    with pytest.raises(ChildFailed, match="give the machine back") as parked:
        await watched.train()
    assert parked.value.child_code == "parked"
    again = Watched(tmp_path, tiny_dir, {**SURE, "save_steps": 1000}, method=METHOD)
    result = await again.train()
    assert result is not None
    assert again.steps[0]["step"] == watched.steps[-1]["step"] + 1 > 27
    assert (result.steps, result.planned_steps, result.time_limited) == (48, 48, False)
    assert [line["objective"] for line in watched.steps[23:25]] == ["sft", "dpo"]
    assert ["margin" in line and line["margin"] is not None for line in watched.steps[23:25]] == [False, True]


async def test_trouble_in_the_second_phase_does_not_undo_the_first(tiny_dir: Path, tmp_path: Path) -> None:
    """One pair's worse answer has a broken embedding: that phase begins again, at half the rate."""
    base = tmp_path / "base"
    shutil.copytree(tiny_dir, base)
    model = untied(base)
    with torch.no_grad():
        for token in AutoTokenizer.from_pretrained(base)("Q", add_special_tokens=False)["input_ids"]:
            model.model.embed_tokens.weight[token].fill_(float("nan"))
    model.save_pretrained(base)
    _pairs(tmp_path, rejected="Q")
    alarms = {"sensor_seconds": 0.2, "max_roll_backs": 1}
    watched = Watched(tmp_path, base, {"alarms": alarms, **SURE, "save_steps": 1000}, method=METHOD)
    with pytest.raises(StoppedByAlarm, match=r"not a number: the loss became nan .* of dpo .*after 1 roll backs"):
        await watched.train()
    steps = [line["step"] for line in watched.steps]
    broken = max(steps)
    assert broken > 26, "past the warm-up"
    assert steps == [*range(1, broken + 1), *range(25, broken + 1)]
    first, second = (
        max(line["learning_rate"] for line in part) for part in (watched.steps[24:broken], watched.steps[broken:])
    )
    assert (first, second) == (pytest.approx(1e-3), pytest.approx(5e-4))
