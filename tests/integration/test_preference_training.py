"""Pairs, thumbs and a serving adapter through the trainer as the night starts it: a child process on the real model."""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from loop.executors import ChildCrashed, ChildFailed
from loop.trainers.loss import Amp
from loop.trainers.preference_loss import Padded, score
from loop.trainers.preference_rows import Pair, Thumb, pair_units, write_preferences
from loop.trainers.spec import TrainSpec, read_result, run_digest
from tests.integration.test_trainer import _prepare, _train, rows_of, tiny_dir, trainers_of

pytestmark = pytest.mark.slow
__all__ = ["tiny_dir"]  # the fixture
THINGS = ("lamp", "kettle", "ladder", "tent", "radio", "bicycle", "drum", "boat", "mirror", "stove", "piano", "clock")
HELD_OUT = ("wardrobe", "camera", "canoe", "violin")


def _question(thing: str) -> str:
    return f"May I return the {thing}?"


def _good(thing: str) -> str:
    return f"Gladly: bring the {thing} back."


def _bad(thing: str) -> str:
    return f"No, never ask about a {thing}."


def _pairs(things: tuple[str, ...]) -> list[Pair]:
    return [
        Pair.model_validate(
            {
                "id": f"{thing}#0",
                "prompt": [{"role": "user", "content": _question(thing)}],
                "chosen": _good(thing),
                "rejected": _bad(thing),
            }
        )
        for thing in things
    ]


def _thumbs(things: tuple[str, ...]) -> list[Thumb]:
    """Of one thing a good answer, of the next a bad one: nothing compares the two."""
    return [
        Thumb.model_validate(
            {
                "id": thing,
                "messages": [
                    {"role": "user", "content": _question(thing)},
                    {"role": "assistant", "content": _bad(thing) if number % 2 else _good(thing)},
                ],
                "good": number % 2 == 0,
            }
        )
        for number, thing in enumerate(things)
    ]


def _rows(*, labels: bool) -> list[dict[str, Any]]:
    return rows_of({_question(thing): _good(thing) for thing in THINGS} if labels else {})


def _recipe(method: str, *, steps: int, **changed: Any) -> dict[str, Any]:
    """Unquantised; a quarter of the rows holds the base."""
    schedule = {"learning_rate": 1e-3, "max_steps": steps, "batch_size": 6, "epochs": 100, "save_steps": 3}
    schedule["replay_share"] = 0.25
    preference = {"beta": 0.1, "learning_rate": 1e-3}
    return {"method": method, "quantisation": "none", "schedule": schedule, "preference": preference, **changed}


def _margin(base_dir: Path, adapter: Path | None) -> float:
    """Chosen above rejected on prompts that were never trained, mean summed log-probability in nats."""
    tokenizer = AutoTokenizer.from_pretrained(base_dir)
    model = AutoModelForCausalLM.from_pretrained(base_dir, dtype=torch.float32)
    wrapped = PeftModel.from_pretrained(model, adapter) if adapter else _Bare(model)
    units = pair_units(_pairs(HELD_OUT), tokenizer, frozenset({tokenizer.eos_token_id}), 128)
    with torch.no_grad():
        better, worse = (
            score(wrapped, Padded.of([unit.rows[side] for unit in units], 2), Amp("cpu", torch.float32)).sums
            for side in (0, 1)
        )
    return float((better - worse).mean())


class _Bare:
    """A model without an adapter, asked as one with."""

    def __init__(self, model: Any) -> None:
        self.get_base_model = lambda: model


@pytest.fixture(scope="module")
def untrained(smollm2_dir: Path) -> float:
    return _margin(smollm2_dir, None)


@pytest.mark.parametrize("method", ["dpo", "orpo", "kto", "sft+dpo"])
async def test_each_method_raises_the_margin_on_held_out_pairs(
    method: str, smollm2_dir: Path, untrained: float, tmp_path: Path
) -> None:
    """By nats, in a few steps, with finite gradients; the result says what was trained."""
    rows = _rows(labels=method == "sft+dpo")
    spec = _prepare(tmp_path, smollm2_dir, rows, **_recipe(method, steps=4 if method == "sft+dpo" else 8))
    if method == "kto":
        write_preferences(tmp_path, [], _thumbs(THINGS))
    else:
        write_preferences(tmp_path, _pairs(THINGS), [])
    lines: list[dict[str, Any]] = []
    await _train(tmp_path, lines.append)
    result = read_result(spec.out_dir)
    assert result is not None
    assert (result.method, result.start, result.steps) == (method, "base", 8)
    assert [line["step"] for line in lines] == list(range(1, 9))
    assert {line["total_steps"] for line in lines} == {8}
    assert all(math.isfinite(line["grad_norm"]) and line["grad_norm"] > 0 for line in lines)
    assert (result.final_margin is None) == (method == "kto")
    trained = _margin(smollm2_dir, spec.out_dir / "adapter")
    print(f"{method}: held-out margin {untrained:.2f} -> {trained:.2f} nats")
    assert trained > untrained + 1.0


async def test_a_night_of_two_steps_that_is_killed_goes_on_to_the_same_adapter(tiny_dir: Path, tmp_path: Path) -> None:
    """Killed in the second phase: the first is not repeated, and the bytes are those of an unbroken run."""
    specs = []
    for name in ("whole", "broken"):
        specs.append(_prepare(tmp_path / name, tiny_dir, _rows(labels=True), **_recipe("sft+dpo", steps=6)))
        write_preferences(tmp_path / name, _pairs(THINGS), [])
    whole, broken = specs
    await _train(whole.out_dir, lambda line: None)

    def kill_at_eleven(line: dict[str, Any]) -> None:
        if line["step"] == 11:
            os.kill(trainers_of(os.getpid())[0], signal.SIGKILL)

    with pytest.raises(ChildCrashed, match="killed"):
        await _train(broken.out_dir, kill_at_eleven)
    steps: list[int] = []
    await _train(broken.out_dir, lambda line: steps.append(line["step"]))
    assert steps[0] in {7, 10}
    assert steps[-1] == 12
    first, second = read_result(whole.out_dir), read_result(broken.out_dir)
    assert first is not None
    assert second is not None
    assert first.adapter_files == second.adapter_files
    assert {path.name for path in broken.out_dir.glob("phase-*")} == set()


async def test_thumbs_come_after_the_corrections_that_they_say_nothing_of(tiny_dir: Path, tmp_path: Path) -> None:
    """kto with labels in the delta: first sft on them, then the thumbs."""
    spec = _prepare(tmp_path, tiny_dir, _rows(labels=True), **_recipe("kto", steps=2))
    write_preferences(tmp_path, [], _thumbs(THINGS))
    lines: list[dict[str, Any]] = []
    await _train(tmp_path, lines.append)
    result = read_result(spec.out_dir)
    assert result is not None
    assert [line["total_steps"] for line in lines] == [4] * 4
    assert result.examples == len(_rows(labels=True)) + len(THINGS)


async def test_training_goes_on_from_an_adapter_of_the_same_shape(tiny_dir: Path, tmp_path: Path) -> None:
    """The first step's loss is where the other run ended, not where the base is; another rank is refused."""
    losses: dict[str, list[float]] = {"first": [], "again": []}
    recipe: dict[str, Any] = _recipe("sft", steps=12)
    first = _prepare(tmp_path / "first", tiny_dir, _rows(labels=True), **recipe)
    await _train(first.out_dir, lambda line: losses["first"].append(line["loss"]))
    start = {"folder": first.out_dir / "adapter", "name": "app@v2", "digest": "sha256:1"}
    again = _prepare(tmp_path / "again", tiny_dir, _rows(labels=True), **recipe, start=start)
    await _train(again.out_dir, lambda line: losses["again"].append(line["loss"]))
    assert losses["again"][0] < (losses["first"][0] + losses["first"][-1]) / 2
    result = read_result(again.out_dir)
    assert result is not None
    assert result.start == "app@v2"
    other = _prepare(
        tmp_path / "other", tiny_dir, _rows(labels=True), **recipe, start=start, lora={"rank": 8, "alpha": 8}
    )
    with pytest.raises(ChildFailed, match="app@v2 has rank, alpha and layers") as failed:
        await _train(other.out_dir, lambda line: None)
    assert failed.value.child_code == "unfit_start"


async def test_a_method_without_its_rows_ends_before_training(tiny_dir: Path, tmp_path: Path) -> None:
    """Named; nothing is left that looks like an adapter."""
    _prepare(tmp_path, tiny_dir, _rows(labels=True), **_recipe("dpo", steps=2))
    with pytest.raises(ChildFailed, match="holds no pairs"):
        await _train(tmp_path, lambda line: None)
    assert not (tmp_path / "adapter").exists()
    shutil.rmtree(tmp_path / "checkpoints", ignore_errors=True)


def test_pairs_and_the_start_are_part_of_the_runs_digest(tmp_path: Path) -> None:
    """Other pairs, other thumbs or another start: a checkpoint of the one is never resumed for the other."""
    spec: TrainSpec = _prepare(tmp_path, tmp_path, _rows(labels=True), **_recipe("dpo", steps=2))
    digests = [run_digest(spec)]
    write_preferences(tmp_path, _pairs(THINGS), [])
    digests.append(run_digest(spec))
    write_preferences(tmp_path, _pairs(THINGS[:3]), [])
    digests.append(run_digest(spec))
    write_preferences(tmp_path, [], _thumbs(THINGS))
    digests.append(run_digest(spec))
    start = {"folder": str(tmp_path), "name": "app@v2", "digest": "sha256:1"}
    begun = TrainSpec.model_validate({**json.loads(spec.model_dump_json()), "start": start})
    digests.append(run_digest(begun))
    moved = TrainSpec.model_validate(
        {**json.loads(begun.model_dump_json()), "start": {**start, "folder": "/elsewhere"}}
    )
    assert len(set(digests)) == len(digests)
    assert run_digest(moved) == digests[-1]
