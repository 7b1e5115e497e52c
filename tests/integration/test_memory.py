"""Memory plans in real trainer processes: out of memory, a near miss, a kill; and what they leave unchanged."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from loop.executors import ChildCrashed, LocalExecutor
from loop.machine_memory import host
from loop.memory_plan import Plan
from loop.memory_record import read_record
from loop.run_plan import planned
from loop.trainers import peft as peft_backend
from loop.trainers.planned_run import compute_dtype
from loop.trainers.preference_rows import Pair, Thumb, write_preferences
from loop.trainers.spec import TrainResult, TrainSpec, read_result, read_rows, write_spec
from loop.training_run import with_smaller_plans
from tests.integration.test_trainer import trainers_of

pytestmark = pytest.mark.slow
SPECIAL = ["<|bos|>", "<|eos|>", "<|pad|>"]
TEMPLATE = (
    "{% for m in messages %}#{{ m.role[0] }}{{ m.content }}<|eos|>{% endfor %}"
    "{% if add_generation_prompt %}#a{% endif %}"
)
GIB = 2**30
ROWS, LENGTH = 8, 600


@pytest.fixture(scope="module")
def base_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model of two small layers but many words, with a token a byte."""
    folder = tmp_path_factory.mktemp("base")
    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    inner.train_from_iterator([], trainers.BpeTrainer(special_tokens=SPECIAL, initial_alphabet=alphabet))
    names = {"bos_token": SPECIAL[0], "eos_token": SPECIAL[1], "pad_token": SPECIAL[2]}
    PreTrainedTokenizerFast(tokenizer_object=inner, chat_template=TEMPLATE, **names).save_pretrained(folder)
    torch.manual_seed(0)
    shape = {"vocab_size": 512, "hidden_size": 64, "intermediate_size": 1024, "num_hidden_layers": 8}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 32}
    special = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2, "max_position_embeddings": 8192}
    LlamaForCausalLM(LlamaConfig(**shape, **heads, **special)).to(torch.bfloat16).save_pretrained(folder)
    return folder


def _spec(folder: Path, base_dir: Path, **changed: Any) -> TrainSpec:
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "train.jsonl").open("w", encoding="utf-8") as file:
        for number in range(ROWS):
            texts = (("user", f"Question {number}?"), ("assistant", f"{number} is so. " * (LENGTH // 10)))
            messages = [{"role": role, "content": text[:LENGTH]} for role, text in texts]
            kind = "replay" if number % 4 == 0 else "label"
            file.write(json.dumps({"id": f"row-{number}", "kind": kind, "messages": messages}) + "\n")
    fields: dict[str, Any] = {
        **{"base_dir": base_dir, "base_name": "base", "base_digest": "sha256:0", "data_dir": folder},
        **{"out_dir": folder / "out", "lora": {"rank": 4, "alpha": 8}, "lengths": {"max_length": 1024}},
        "schedule": {"max_steps": 2, "batch_size": ROWS, "epochs": 100, "save_steps": 1, "learning_rate": 1e-2},
    }
    spec = TrainSpec.model_validate(fields | changed)
    write_spec(spec, folder / "spec.json")
    return spec


async def _train(
    folder: Path, on_progress: Callable[[dict[str, Any]], None] = lambda line: None
) -> tuple[TrainResult, list[Plan]]:
    fell_back: list[Plan] = []
    await with_smaller_plans(
        lambda: LocalExecutor().run(
            "loop.trainers.peft",
            folder / "spec.json",
            on_progress=on_progress,
            log_path=folder / "trainer.log",
            environment={},
        ),
        folder / "out",
        fell_back.append,
    )
    result = read_result(folder / "out")
    assert result is not None
    return result, fell_back


def _preferences(folder: Path, base_dir: Path, method: str, **changed: Any) -> TrainSpec:
    """As `_spec`; and eight pairs or thumbs of like length."""
    spec = _spec(folder, base_dir, method=method, **changed)
    answers = {"chosen": "so. " * (LENGTH // 4), "rejected": "not so. " * (LENGTH // 8)}
    pairs, thumbs = [], []
    for number in range(ROWS):
        prompt = [{"role": "user", "content": f"Question {number}?"}]
        pairs.append(Pair.model_validate({"id": f"p{number}", "prompt": prompt, **answers}))
        messages = [*prompt, {"role": "assistant", "content": answers["chosen"]}]
        thumbs.append(Thumb.model_validate({"id": f"t{number}", "messages": messages, "good": number % 2 == 0}))
    write_preferences(folder, [] if method == "kto" else pairs, thumbs if method == "kto" else [])
    return spec


def _plan(**changed: Any) -> Plan:
    fields = {"micro_tokens": 100_000, "estimated_bytes": 1, "budget_bytes": GIB, "device": "cpu", "tokens_per_s": 1}
    return Plan.model_validate(fields | changed)


async def test_out_of_memory_a_fresh_trainer_takes_the_next_plan(base_dir: Path, tmp_path: Path) -> None:
    """A real limit, and a first plan that promised too much: the second one trains to the end, and all is told."""
    tight = 0.95 * GIB
    plans = (_plan(budget_bytes=int(tight)), _plan(budget_bytes=int(tight), checkpointing="on", micro_tokens=620))
    spec = _spec(tmp_path, base_dir, memory={"budget_gib": tight / GIB, "plans": plans})
    result, fell_back = await _train(tmp_path)
    assert fell_back == [plans[1]]
    assert result.memory is not None
    assert (result.steps, result.memory.plan.checkpointing, result.memory.plan.micro_tokens) == (2, "on", 620)
    first = result.memory.attempts[0]
    assert (first.outcome, first.plan.checkpointing) == ("out_of_memory", "off")
    assert 0 < result.memory.measured_bytes <= tight * 1.05
    assert (spec.out_dir / "adapter" / "adapter_model.safetensors").exists()


async def test_a_near_miss_halves_what_is_trained_at_once(base_dir: Path, tmp_path: Path) -> None:
    """Above 95 % of the budget, down to one row; the batch stays eight rows."""
    _spec(tmp_path, base_dir, memory={"plans": (_plan(budget_bytes=GIB // 4, micro_tokens=ROWS * 620),)})
    result, fell_back = await _train(tmp_path)
    assert result.memory is not None
    assert fell_back == []
    assert {attempt.outcome for attempt in result.memory.attempts} == {"near_miss"}
    assert result.memory.plan.micro_tokens < 620 * 2
    assert result.memory.plan.micro_batches == ROWS
    assert all(attempt.measured_bytes for attempt in result.memory.attempts)


async def test_parts_and_recomputing_train_the_same(base_dir: Path, tmp_path: Path) -> None:
    """The loss curve of whole batches and of one row at a time, recomputed: the same but for the order of sums."""
    curves = []
    for name, memory in (("whole", {}), ("parts", {"micro_tokens": 1, "checkpointing": "on"})):
        _spec(tmp_path / name, base_dir, memory=memory)
        losses: list[float] = []
        result, _ = await _train(tmp_path / name, lambda line, losses=losses: losses.append(line["loss"]))  # type: ignore[misc]
        assert result.memory is not None
        assert result.memory.plan.micro_batches == (1 if name == "whole" else ROWS)
        curves.append(losses)
    assert curves[1] == pytest.approx(curves[0], rel=0.01)
    assert curves[0][-1] != curves[0][0]


async def test_a_killed_training_keeps_its_plan(base_dir: Path, tmp_path: Path) -> None:
    """Also when more memory is free afterwards; and a kill is no reason for a smaller one."""
    _spec(tmp_path, base_dir, memory={"checkpointing": "on", "micro_tokens": 700})
    told: list[int] = []

    def kill_at_one(line: dict[str, Any]) -> None:
        told.append(line["step"])
        if told == [1]:
            os.kill(trainers_of(os.getpid())[0], signal.SIGKILL)

    with pytest.raises(ChildCrashed, match="killed"):
        await _train(tmp_path, kill_at_one)
    before = read_record(tmp_path / "out")
    assert before is not None
    _spec(tmp_path, base_dir, memory={"plans": (_plan(),)})  # what a new preflight might say
    result, _ = await _train(tmp_path, kill_at_one)
    assert result.memory is not None
    assert result.memory.plan == before.plans[0]
    assert result.memory.attempts == ()
    assert told[1] in {1, 2}  # from the checkpoint, where there was one


async def test_preferences_fall_back_to_the_next_plan(base_dir: Path, tmp_path: Path) -> None:
    """Out of memory with both rows of all pairs at once, they train recomputed, a pair at a time."""
    tight = 0.95 * GIB
    plans = (_plan(budget_bytes=int(tight)), _plan(budget_bytes=int(tight), checkpointing="on", micro_tokens=1300))
    schedule = {"max_steps": 2, "batch_size": 16, "epochs": 100, "save_steps": 1}
    _preferences(tmp_path, base_dir, "dpo", schedule=schedule, memory={"budget_gib": tight / GIB, "plans": plans})
    result, fell_back = await _train(tmp_path)
    assert fell_back == [plans[1]]
    assert result.memory is not None
    assert (result.steps, result.memory.plan) == (2, plans[1])
    assert [attempt.outcome for attempt in result.memory.attempts] == ["out_of_memory"]
    assert 0 < result.memory.measured_bytes <= tight * 1.05


@pytest.mark.parametrize("method", ["dpo", "orpo", "kto", "sft+dpo"])
async def test_preferences_take_the_memory_that_was_planned(method: str, base_dir: Path, tmp_path: Path) -> None:
    """Planned as the preflight does; measured within a third, as docs/trainer.md says of a CPU, over all phases."""
    spec = _preferences(tmp_path, base_dir, method)
    made = planned(spec, "peft", read_rows(tmp_path), host())
    assert made.spec.memory.plans[0].micro_batches == 1
    write_spec(made.spec, tmp_path / "spec.json")
    result, fell_back = await _train(tmp_path)
    assert result.memory is not None
    assert (fell_back, result.memory.note, result.memory.attempts) == ([], "", ())
    assert result.memory.plan == made.spec.memory.plans[0]
    assert result.memory.measured_bytes == pytest.approx(result.memory.plan.estimated_bytes, rel=1 / 3)


async def test_a_near_miss_of_preferences_goes_down_to_a_pair(base_dir: Path, tmp_path: Path) -> None:
    """Both phases train with what the first one was lowered to, and take the memory of it."""
    schedule = {"max_steps": 2, "batch_size": ROWS, "epochs": 100, "save_steps": 1, "replay_share": 0.0}
    memory = {"plans": (_plan(budget_bytes=GIB // 4, micro_tokens=ROWS * 620),)}
    _preferences(tmp_path, base_dir, "sft+dpo", schedule=schedule, memory=memory)
    result, fell_back = await _train(tmp_path)
    assert result.memory is not None
    assert fell_back == []
    assert {attempt.outcome for attempt in result.memory.attempts} == {"near_miss"}
    assert 620 <= result.memory.plan.micro_tokens < 2 * 2 * 620
    assert result.memory.measured_bytes < 0.88 * (result.memory.attempts[0].measured_bytes or 0)
    assert result.steps == 4


def test_a_four_bit_base_still_passes_gradients_after_a_call_without(base_dir: Path, tmp_path: Path) -> None:
    """On a CPU with bfloat16 instructions, bitsandbytes repacks layers that are called in eval mode, and such a layer
    passes no gradient on: every adapter but the last ones would be trained wrongly, in silence."""

    def gradient(*, called_before: bool) -> torch.Tensor:
        torch.manual_seed(0)
        model = peft_backend.load(_spec(tmp_path, base_dir), longest=200)
        for name, weight in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.constant_(weight, 0.01)
        ids = torch.arange(3, 203)[None]
        with torch.autocast("cpu", dtype=compute_dtype()):
            if called_before:
                with torch.no_grad():
                    model.get_base_model().base_model(input_ids=ids)
            model.train()
            model.get_base_model().base_model(input_ids=ids).last_hidden_state.float().pow(2).mean().backward()
        found: torch.Tensor = (
            model.get_submodule("base_model.model.model.layers.0.self_attn.v_proj").lora_B["default"].weight.grad
        )
        return found

    torch.testing.assert_close(gradient(called_before=True), gradient(called_before=False), rtol=0.05, atol=1e-6)
