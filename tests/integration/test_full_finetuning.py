"""Full fine-tuning through the trainer as the night starts it: what comes out is an adapter that can be served."""

from __future__ import annotations

import asyncio
import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from loop.adapter_files import check, read_base_config
from loop.executors import ChildCrashed
from loop.machine_memory import host
from loop.memory_record import read_record
from loop.run_plan import planned
from loop.settings import LINEAR_LAYERS
from loop.trainers import peft as peft_backend
from loop.trainers.child import load_tokenizer
from loop.trainers.full_finetuning import changed_layers
from loop.trainers.loss import Amp
from loop.trainers.planned_run import compute_dtype
from loop.trainers.preference_loss import Padded, score, score_base
from loop.trainers.preference_rows import write_preferences
from loop.trainers.rows import Example
from loop.trainers.spec import TrainResult, TrainSpec, read_result, read_rows, write_spec
from tests.integration.test_preference_training import THINGS, _Bare, _pairs, _rows
from tests.integration.test_trainer import _prepare, _train, tiny_dir, trainers_of

pytestmark = pytest.mark.slow
__all__ = ["tiny_dir"]  # the fixture
FULL = {"finetuning_type": "full", "quantisation": "none"}
Learned = tuple[TrainSpec, list[dict[str, Any]], TrainResult]


def _full(folder: Path, base_dir: Path, **changed: Any) -> TrainSpec:
    """Eight steps of a rate at which a small random model moves."""
    schedule = {"learning_rate": 1e-3, "max_steps": 8, "batch_size": 6, "epochs": 100, "save_steps": 2}
    return _prepare(folder, base_dir, **{**FULL, "schedule": schedule, **changed})


def _result(folder: Path) -> TrainResult:
    result = read_result(folder)
    assert result is not None
    return result


@pytest.fixture(scope="module")
def learned(smollm2_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Learned:
    """The real 135M model, planned as the preflight does."""
    folder = tmp_path_factory.mktemp("full")
    schedule = {"learning_rate": 1e-4, "max_steps": 12, "batch_size": 6, "epochs": 100}
    spec = _full(folder, smollm2_dir, schedule=schedule, lora={"rank": 16, "alpha": 32})
    spec = planned(spec, "peft", read_rows(folder), host()).spec
    write_spec(spec, folder / "spec.json")
    lines: list[dict[str, Any]] = []
    asyncio.run(_train(folder, lines.append))
    return spec, lines, _result(folder)


async def test_the_loss_falls_and_an_adapter_comes_out(learned: Learned) -> None:
    """Two files that every check before serving lets through; the result says what they keep of the training."""
    spec, lines, result = learned
    assert lines[-1]["loss"] < 0.6 * lines[0]["loss"]
    files = check(
        spec.out_dir / "adapter",
        read_base_config(spec.base_dir),
        max_rank=16,
        target_modules=LINEAR_LAYERS,
        base_name=spec.base_name,
    )
    assert (files.rank, files.alpha, files.effect_norm > 0) == (16, 32, True)
    assert result.finetuning_type == "full"
    assert result.extraction is not None
    assert 0.1 < result.extraction.least_kept_share <= result.extraction.kept_share <= 1
    assert not (spec.out_dir / "checkpoints").exists()


async def test_what_is_served_has_learnt(learned: Learned) -> None:
    """The adapter on the plain base: the right answers have become likelier by nats a token."""
    spec, _, _ = learned
    base = AutoModelForCausalLM.from_pretrained(spec.base_dir, dtype=torch.float32)
    tokenizer = load_tokenizer(spec)
    rows = [row for row in read_rows(spec.data_dir) if row.kind == "label"]
    examples = []
    for row in rows:
        messages = [message.model_dump() for message in row.messages]
        prompt = tokenizer.apply_chat_template(messages[:-1], add_generation_prompt=True, return_dict=True)["input_ids"]
        answer = tokenizer(row.messages[-1].content)["input_ids"]
        examples.append(Example(row.id, (*prompt, *answer), len(prompt), replay=False))
    served = PeftModel.from_pretrained(base, spec.out_dir / "adapter")
    amp = Amp("cpu", torch.float32)
    batch = Padded.of(examples, 2)
    with torch.no_grad():
        taught, before = score(served, batch, amp), score_base(served, batch, amp)
    assert float(((taught.sums - before.sums) / taught.lengths).min()) > 1.0


async def test_it_takes_the_memory_that_was_planned(learned: Learned) -> None:
    """Within a third, as docs/trainer.md says of a CPU; by the preflight's own plan."""
    spec, _, result = learned
    assert result.memory is not None
    assert result.memory.plan == spec.memory.plans[0]
    assert result.memory.note == ""
    estimated = result.memory.plan.estimated_bytes
    assert result.memory.measured_bytes == pytest.approx(estimated, rel=1 / 3)
    assert estimated > 18 * 100e6, "of more than a hundred million weights"


async def test_a_killed_run_ends_with_the_same_bytes(tiny_dir: Path, tmp_path: Path) -> None:
    """From its last checkpoint, which holds changes, moments and plan; replay rows are held to the base again."""
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    _full(whole, tiny_dir)
    await _train(whole, lambda line: None)
    _full(killed, tiny_dir)
    steps: list[int] = []

    def kill_at_five(line: dict[str, Any]) -> None:
        steps.append(line["step"])
        if steps == [1, 2, 3, 4, 5]:
            os.kill(trainers_of(os.getpid())[0], signal.SIGKILL)

    with pytest.raises(ChildCrashed):
        await _train(killed, kill_at_five)
    assert read_record(killed) is not None
    del steps[:]
    await _train(killed, kill_at_five)
    assert steps[0] in {3, 5}
    assert _result(killed).adapter_files == _result(whole).adapter_files
    assert _result(killed).extraction == _result(whole).extraction


async def test_going_on_from_an_adapter_begins_there(tiny_dir: Path, tmp_path: Path) -> None:
    """A step of next to no rate gives back what it started from, though a change of its weights was trained."""
    first, second = tmp_path / "first", tmp_path / "second"
    _full(first, tiny_dir)
    await _train(first, lambda line: None)
    start = {"folder": first / "adapter", "name": "app@v2", "digest": "sha256:a"}
    schedule = {"learning_rate": 1e-9, "max_steps": 1, "batch_size": 6}
    _full(second, tiny_dir, start=start, schedule=schedule)
    await _train(second, lambda line: None)
    before, after = (_products(folder / "adapter") for folder in (first, second))
    for name, product in before.items():
        assert (after[name] - product).norm() < 0.02 * product.norm(), name
    assert _result(second).start == "app@v2"
    extraction = _result(second).extraction
    assert extraction is not None
    assert extraction.kept_share > 0.999


def _products(adapter: Path) -> dict[str, torch.Tensor]:
    config = json.loads((adapter / "adapter_config.json").read_text())
    weights = {name: weight.float() for name, weight in load_file(adapter / "adapter_model.safetensors").items()}
    scaling = config["lora_alpha"] / config["r"]
    return {
        name: scaling * weights[name.replace("lora_A", "lora_B")] @ a for name, a in weights.items() if "lora_A" in name
    }


@pytest.mark.parametrize("method", ["dpo", "sft+dpo"])
async def test_preferences_compare_with_the_untouched_base(method: str, tiny_dir: Path, tmp_path: Path) -> None:
    """Of both phases: the margin grows from the base's."""
    schedule = {"learning_rate": 1e-3, "max_steps": 6, "batch_size": 6, "epochs": 100, "replay_share": 0.25}
    preference = {"learning_rate": 1e-3}
    rows = _rows(labels=method == "sft+dpo")
    spec = _prepare(tmp_path, tiny_dir, rows, **FULL, method=method, schedule=schedule, preference=preference)
    write_preferences(tmp_path, _pairs(THINGS), [])
    lines: list[dict[str, Any]] = []
    await _train(tmp_path, lines.append)
    margins = [line["margin"] for line in lines if line.get("margin") is not None]
    assert margins[-1] > margins[0] + 1
    result = _result(tmp_path)
    assert (result.method, result.finetuning_type) == (method, "full")
    assert result.extraction is not None
    assert spec.method == method


def test_the_reference_is_the_base_whatever_has_changed(tiny_dir: Path, tmp_path: Path) -> None:
    model = peft_backend.load(_full(tmp_path, tiny_dir), longest=32)
    plain = AutoModelForCausalLM.from_pretrained(tiny_dir, dtype=compute_dtype(), attn_implementation="eager")
    batch = Padded.of([Example("a", tuple(range(5, 25)), 9, replay=False)], 2)
    amp = Amp("cpu", compute_dtype())
    with torch.no_grad():
        for _, layer in changed_layers(model):
            layer.change.normal_(std=0.1)
        untouched = score_base(model, batch, amp).sums
        moved = score(model, batch, amp).sums
        expected = score(_Bare(plain), batch, amp).sums
    assert torch.equal(untouched, expected)
    assert abs(float(moved - untouched)) > 0.1
