"""Pairs and thumbs on several ranks: the adapter, the losses and the margins of one, and its phases after a kill."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch

from loop.trainers.preference_rows import write_preferences
from loop.trainers.spec import TrainSpec, read_result
from tests.integration.test_preference_training import THINGS, _pairs, _recipe, _rows, _thumbs
from tests.integration.test_several_ranks import _kill_at, adapter, away, ranks_below, train
from tests.integration.test_trainer import _prepare, tiny_dir

__all__ = ["tiny_dir"]  # a fixture
pytestmark = pytest.mark.slow
FIGURES = ("step", "total_steps", "loss", "grad_norm", "learning_rate", "margin")
Lines = list[dict[str, Any]]


def prepare(
    folder: Path, base_dir: Path, method: str, gpus: int = 1, sharding: str = "auto", **changed: Any
) -> TrainSpec:
    """Three pairs or thumbs a step, and replay rows beside them, which two ranks can't halve; parts of a few rows.

    All thumbs are up: answers to whatever question gain then, and the drift that kto measures is above 0.
    """
    recipe = _recipe(
        method, steps=4, threads=1, memory={"micro_tokens": 90}, cards={"gpus": gpus, "sharding": sharding}
    )
    recipe["schedule"] |= {"batch_size": 7, "save_steps": 2, "replay_share": 0.3}
    labels = method == "sft+dpo"
    spec = _prepare(folder, base_dir, _rows(labels=labels), **(recipe | changed))
    if method == "kto":
        write_preferences(folder, [], [thumb.model_copy(update={"good": True}) for thumb in _thumbs(THINGS)])
    else:
        write_preferences(folder, _pairs(THINGS), [])
    return spec


async def run(spec: TrainSpec) -> Lines:
    lines: Lines = []
    await train(spec.out_dir, lines.append)
    return lines


async def _same_as_one(tmp_path: Path, base_dir: Path, method: str, ways: list[str], **changed: Any) -> None:
    alone = prepare(tmp_path / "alone", base_dir, method, **changed)
    of_one, first = await run(alone), read_result(alone.out_dir)
    assert first is not None
    for way in ways:
        several = prepare(tmp_path / way, base_dir, method, 2, way, **changed)
        of_two, second = await run(several), read_result(several.out_dir)
        for one, other in zip(of_one, of_two, strict=True):
            told = {
                name: (one[name], other[name]) for name in FIGURES if one[name] is not None or other[name] is not None
            }
            assert one["objective"] == other["objective"]
            for name, (expected, found) in told.items():
                assert found == pytest.approx(expected, rel=2e-2, abs=1e-4), f"{name} of step {one['step']}, {way}"
        moved, other_moved = (_moved(adapter(spec)) for spec in (alone, several))
        assert away(moved, other_moved) < 0.04
        assert second is not None
        assert (second.gpus, second.sharding, second.method) == (2, way, method)
        assert second.memory is not None
        assert second.memory.plan.micro_batches > 1, "in parts, of which one rank has more than the other"
        assert (second.steps, second.tokens, second.examples) == (first.steps, first.tokens, first.examples)
        assert second.final_margin == (first.final_margin and pytest.approx(first.final_margin, rel=1e-2))
        assert not list(several.out_dir.glob("phase-*"))


def _moved(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """What is zero before the first step."""
    return {name: weight for name, weight in weights.items() if "lora_B" in name}


async def test_two_ranks_make_the_adapter_of_one_by_pairs(tiny_dir: Path, tmp_path: Path) -> None:
    """With the base whole on each and shared out: the same losses, gradient norms and margins at each step, the same
    weights, but for rounding."""
    await _same_as_one(tmp_path, tiny_dir, "dpo", ["replicate", "fsdp"])


async def test_two_ranks_make_the_adapter_of_one_by_thumbs(tiny_dir: Path, tmp_path: Path) -> None:
    """So strongly taught that the drift, which is the whole step's on both, is far from 0."""
    taught = {"beta": 0.5, "learning_rate": 1e-2}
    await _same_as_one(tmp_path, tiny_dir, "kto", ["replicate", "fsdp"], preference=taught)


@pytest.mark.long
async def test_two_ranks_make_the_adapter_of_one_by_odds(tiny_dir: Path, tmp_path: Path) -> None:
    """orpo asks no base of its pairs, and by cross entropy none of its replay rows: fewer passes to keep in step."""
    schedule = {**_recipe("orpo", steps=4)["schedule"], "replay_loss": "ce"}
    await _same_as_one(tmp_path, tiny_dir, "orpo", ["replicate", "fsdp"], schedule=schedule)


@pytest.mark.long
async def test_two_ranks_make_the_adapter_of_one_in_two_phases(tiny_dir: Path, tmp_path: Path) -> None:
    """In 4 bits; each phase counts on from the other."""
    await _same_as_one(tmp_path, tiny_dir, "sft+dpo", ["replicate", "fsdp"], quantisation="nf4")


async def test_two_ranks_that_are_killed_go_on_in_the_phase_where_they_stood(tiny_dir: Path, tmp_path: Path) -> None:
    """The second: the first is not trained again, and the bytes are those of an unbroken run; with dropout."""
    lora = {"rank": 4, "alpha": 8, "dropout": 0.1}
    whole, broken = (prepare(tmp_path / name, tiny_dir, "sft+dpo", 2, lora=lora) for name in ("whole", "broken"))
    await run(whole)
    await _kill_at(broken, 7, lambda: ranks_below(os.getpid())[2])
    steps = [line["step"] for line in await run(broken)]
    assert steps[0] in {5, 7}
    assert steps[-1] == 8
    first, second = read_result(whole.out_dir), read_result(broken.out_dir)
    assert first is not None
    assert second is not None
    assert first.adapter_files == second.adapter_files
