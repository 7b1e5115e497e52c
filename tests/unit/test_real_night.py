"""The GPU bench's night: its figures, from answers to bars. The night itself needs vLLM and runs by hand."""

from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from loop.settings import EngineSettings, ProjectSettings
from loop.vllm import Replica

SCRIPT = Path(__file__).parents[2] / "deploy" / "gpu-bench" / "real_night.py"


@pytest.fixture(scope="module")
def script() -> Iterator[ModuleType]:
    spec = importlib.util.spec_from_file_location("real_night", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkey = pytest.MonkeyPatch()
    monkey.setitem(sys.modules, spec.name, module)  # its dataclasses look themselves up there
    monkey.syspath_prepend(SCRIPT.parent)  # as Python does for a script
    spec.loader.exec_module(module)
    yield module
    monkey.undo()


def told(out: Path) -> dict[str, dict[str, Any]]:
    lines = (out / "figures.jsonl").read_text().splitlines()
    return {line.pop("bench"): line for line in map(json.loads, lines)}


def answers(right: int, wrong: int) -> list[tuple[str, bool]]:
    return [("yes", True)] * right + [("no", False)] * wrong


@pytest.mark.parametrize(("held_out", "lost", "reached"), [(50, 1, (True, True)), (49, 2, (False, False))])
def test_figures_stand_beside_their_bars(
    script: ModuleType, tmp_path: Path, held_out: int, lost: int, reached: tuple[bool, bool]
) -> None:
    project = ProjectSettings(name="night", base_dir=tmp_path, base_name="base")
    night = script.Night(tmp_path, project, EngineSettings(), Replica("http://127.0.0.1:1"), "", 1.0)
    base = {"trained": answers(0, 8), "held_out": answers(0, 52), "probes": answers(103, 0)}
    taught = {
        "trained": answers(8, 0),
        "held_out": answers(held_out, 52 - held_out),
        "probes": answers(103 - lost, lost),
    }
    night.compare("peft", base, taught)
    lines = told(tmp_path)
    assert lines["night: peft: exam"]["held_out"]["newly_right"] == held_out
    assert lines["night: peft: exam"]["probes"] == {
        "of": 103, "base_right": 103, "right": 103 - lost, "newly_wrong": lost, "newly_right": 0,
    }  # fmt: skip
    bars = (lines["night: peft: held-out questions right"], lines["night: peft: probes newly wrong"])
    assert tuple(bar["reached"] for bar in bars) == reached


def test_speed_counts_tokens_of_the_steps_that_were_timed(script: ModuleType) -> None:
    lines = [{"step": step, "elapsed_s": 10.0 + 2 * step} for step in range(5)]
    dumped = {"packed": True}
    result = SimpleNamespace(
        tokens=1000, seconds=9.0, steps=5, unquantised_steps=1, peak_memory_bytes=2**30, final_loss=0.1,
        model_dump=lambda include: dumped,
    )  # fmt: skip
    speed = script._speed([*lines, {"utilisation": 3}], result)
    assert (speed["tokens_per_s"], speed["step_s"], speed["first_step_s"]) == (100.0, 2.0, 10.0)


async def test_a_night_that_fails_is_told_with_its_cure(script: ModuleType, tmp_path: Path) -> None:
    """The next backend still has its turn."""
    project = ProjectSettings(name="night", base_dir=tmp_path / "nothing", base_name="base")
    night = script.Night(tmp_path, project, EngineSettings(), Replica("http://127.0.0.1:1"), "", 5.0)
    assert not await script._one(night, "unsloth", {}, {})
    line = told(tmp_path)["night: unsloth"]
    assert "nothing" in line["failed"]
    assert line["cure"]
