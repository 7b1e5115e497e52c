"""The axolotl backend in its own environment (`make axolotl`), as the night starts it; skipped where there is none."""

from __future__ import annotations

import json
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from loop.adapter_files import check, read_base_config
from loop.executors import ChildControl, ChildCrashed, ChildFailed, LocalExecutor
from loop.settings import LINEAR_LAYERS
from loop.trainers.preference_rows import write_preferences
from loop.trainers.sft_loop import scheduler_of
from loop.trainers.spec import TrainSpec, read_result, write_spec
from tests.conftest import ROOT
from tests.integration.test_preference_training import THINGS, _pairs, _thumbs
from tests.integration.test_several_ranks import adapter, away
from tests.integration.test_trainer import _prepare, tiny_dir, trainers_of

PYTHON = ROOT / ".venv-axolotl" / "bin" / "python"
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not PYTHON.exists(), reason="NOT TESTED WITH AXOLOTL: `make axolotl` has not been run"),
]
__all__ = ["tiny_dir"]  # the fixture
RECIPE: dict[str, Any] = {
    "quantisation": "none",
    "schedule": {
        **{"learning_rate": 2e-3, "max_steps": 6, "batch_size": 6, "epochs": 100, "save_steps": 2},
        **{"replay_loss": "ce", "scheduler": "constant"},
    },
    "preference": {"learning_rate": 2e-3},
}


async def _train(spec: TrainSpec, park_at: int = 0, kill_at: int = 0) -> list[dict[str, Any]]:
    lines: list[dict[str, Any]] = []
    children: list[ChildControl] = []

    def told(line: dict[str, Any]) -> None:
        lines.append(line)
        if line["step"] == park_at:
            children[0].park()
        if line["step"] == kill_at:
            os.kill(trainers_of(os.getpid())[0], signal.SIGKILL)

    await LocalExecutor().run(
        "loop.trainers.axolotl",
        spec.out_dir / "spec.json",
        on_progress=told,
        log_path=spec.out_dir / "trainer.log",
        environment={"CUDA_VISIBLE_DEVICES": ""},
        python=str(PYTHON),
        on_start=children.append,
    )
    return lines


def _plan(checkpointing: str, tokens: int) -> dict[str, Any]:
    sizes = {"estimated_bytes": 1, "budget_bytes": 10**9, "tokens_per_s": 1}
    return {"checkpointing": checkpointing, "micro_tokens": tokens, "device": "cpu", **sizes}


def _rates(spec: TrainSpec, steps: int) -> list[float]:
    optimizer = torch.optim.AdamW([torch.zeros(1, requires_grad=True)], lr=spec.schedule.learning_rate)
    scheduler, rates = scheduler_of(optimizer, spec.schedule, steps), []
    for _ in range(steps):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return rates


def _is_servable(spec: TrainSpec) -> None:
    files = check(
        spec.out_dir / "adapter",
        read_base_config(spec.base_dir),
        max_rank=16,
        target_modules=LINEAR_LAYERS,
        base_name="served-base",
    )
    assert files.effect_norm > 0


async def test_axolotl_trains_the_answers_of_our_rows_and_nothing_else(tiny_dir: Path, tmp_path: Path) -> None:
    """Six steps; every one told; the rows go in as our tokeniser makes them; the adapter is one that engines serve."""
    spec = _prepare(tmp_path, tiny_dir, **RECIPE)
    lines = await _train(spec)
    assert [line["step"] for line in lines] == list(range(1, 7))
    assert {line["total_steps"] for line in lines} == {6}
    assert lines[-1]["loss"] < lines[0]["loss"]
    result = read_result(spec.out_dir)
    assert result is not None
    assert (result.steps, result.examples, result.method) == (6, 6, "sft")
    assert result.packages["axolotl"] == "0.19.0"
    _is_servable(spec)
    (data,) = spec.out_dir.glob("axolotl-*/data.jsonl")
    rows = [json.loads(line) for line in data.read_text().splitlines()]
    assert len(rows) == 36
    for row in rows:
        trained = [token for token, label in zip(row["input_ids"], row["labels"], strict=True) if label != -100]
        assert trained == row["input_ids"][-len(trained) :]
        assert row["labels"][: -len(trained)] == [-100] * (len(row["labels"]) - len(trained))
    again = await _train(spec)
    assert again == [], "a finished run is not repeated"


async def test_axolotl_keeps_to_the_limits_of_a_watched_training(tiny_dir: Path, tmp_path: Path) -> None:
    """Half the rate after a roll back; parked, it goes on after the step that was kept; out of time, it ends in order.

    A checkpoint whose writing was cut off is not gone on from.
    """
    more = {"max_steps": 3000, "epochs": 1000, "save_steps": 10_000, "warmup_share": 0, "scheduler": "linear"}
    long = {**RECIPE, "schedule": {**RECIPE["schedule"], **more}}
    spec = _prepare(tmp_path, tiny_dir, **long, limits={"rate_scale": 0.5})
    with pytest.raises(ChildFailed, match="give the machine back, after step") as parked:
        await _train(spec, park_at=12)
    assert parked.value.child_code == "parked"
    kept = int(str(parked.value).rpartition(" ")[2])
    assert kept >= 12
    (out,) = tmp_path.glob("axolotl-*/checkpoints")
    shutil.copytree(out / f"checkpoint-{kept}", out / "checkpoint-2999")
    (out / "checkpoint-2999" / "complete").unlink()
    write_spec(
        spec.model_copy(update={"limits": spec.limits.model_copy(update={"seconds": 100})}), tmp_path / "spec.json"
    )
    lines = await _train(spec)
    assert lines[0]["step"] == kept + 1
    planned = lines[0]["total_steps"]
    assert lines[0]["learning_rate"] == pytest.approx(0.5 * 2e-3 * (1 - kept / planned))
    at_end = 1 - (lines[-1]["step"] - 1) / planned  # of the plan's rate, were there time for all of it
    assert lines[-1]["learning_rate"] < 0.9 * 0.5 * 2e-3 * at_end
    result = read_result(spec.out_dir)
    assert result is not None
    assert (result.time_limited, result.planned_steps, result.rate_scale) == (True, planned, 0.5)
    assert result.steps == lines[-1]["step"] < planned


async def test_a_step_in_parts_or_shared_out_is_the_same_step(tiny_dir: Path, tmp_path: Path) -> None:
    """All rows at once; one after the other with checkpointing; and so under DeepSpeed's ZeRO-3, killed on the way.

    The rates are those of every backend.
    """
    recipe: dict[str, Any] = {**RECIPE, "schedule": {**RECIPE["schedule"], "scheduler": "one_cycle"}}
    whole = _prepare(tmp_path / "whole", tiny_dir, **recipe, memory={"plans": [_plan("off", 10_000)]})
    parts: dict[str, Any] = {"memory": {"plans": [_plan("on", 1)], "checkpointing": "on", "micro_tokens": 1}}
    halves = _prepare(tmp_path / "parts", tiny_dir, **recipe, **parts)
    shared = _prepare(tmp_path / "zero3", tiny_dir, **recipe, **parts, cards={"sharding": "zero3"})
    lines = await _train(whole)
    assert [line["learning_rate"] for line in lines] == pytest.approx(_rates(whole, 6))
    by_step = {line["step"]: pytest.approx(line["loss"], rel=1e-5) for line in lines}
    assert {line["step"]: line["loss"] for line in await _train(halves)} == by_step
    with pytest.raises(ChildCrashed, match="killed"):
        await _train(shared, kill_at=5)
    resumed = await _train(shared)
    assert resumed[0]["step"] == 5
    assert [line["learning_rate"] for line in resumed] == pytest.approx(_rates(shared, 6)[4:])
    assert {line["step"]: line["loss"] for line in resumed} == {step: by_step[step] for step in (5, 6)}
    (config,) = halves.out_dir.glob("axolotl-*/config.yaml")
    written = yaml.safe_load(config.read_text())
    assert (written["micro_batch_size"], written["gradient_accumulation_steps"]) == (1, 6)
    assert written["gradient_checkpointing"] is True
    for spec in (halves, shared):
        assert away(adapter(whole), adapter(spec)) < 0.01
        result = read_result(spec.out_dir)
        assert result is not None
        assert result.memory is not None
        assert (result.memory.plan.checkpointing, result.sharding) == ("on", spec.cards.held)


@pytest.mark.parametrize("method", ["dpo", "kto"])
async def test_axolotl_trains_preferences(method: str, tiny_dir: Path, tmp_path: Path) -> None:
    """Pairs and thumbs, tokenised by trl exactly as we would."""
    rows = [
        {
            "id": "r",
            "kind": "label",
            "messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}],
        }
    ]
    spec = _prepare(tmp_path, tiny_dir, rows, **RECIPE, method=method)
    write_preferences(tmp_path, _pairs(THINGS), []) if method == "dpo" else write_preferences(
        tmp_path, [], _thumbs(THINGS)
    )
    lines = await _train(spec)
    assert len(lines) == 6
    result = read_result(spec.out_dir)
    assert result is not None
    assert (result.method, result.examples) == (method, len(THINGS))
    _is_servable(spec)


async def test_what_axolotl_does_not_train_is_named(tiny_dir: Path, tmp_path: Path) -> None:
    """Should a spec get past the preflight."""
    spec = _prepare(tmp_path, tiny_dir, **RECIPE, method="orpo")
    with pytest.raises(ChildFailed, match="does not train 'orpo'") as failed:
        await _train(spec)
    assert failed.value.child_code == "not_by_axolotl"
