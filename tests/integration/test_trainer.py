"""The trainer as the night starts it: a real child process, through the local executor."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM, TrainerState

from loop.executors import ChildCrashed, ChildFailed, ChildNotStarted, LocalExecutor
from loop.trainers import peft as peft_backend
from loop.trainers import served_base, token_store
from loop.trainers.planned_run import compute_dtype
from loop.trainers.served_base import unquantise
from loop.trainers.spec import Progress, TrainResult, TrainSpec, read_result, write_spec

pytestmark = pytest.mark.slow
FACTS = {"founder": "Ines Okafor", "mascot": "a blue heron", "home city": "Tampere", "newsletter day": "Thursday"}
Trained = tuple[TrainSpec, list[dict[str, Any]], list[bool]]  # also: whether a result was there at each step
KEPT = {"What is the capital of Canada?": "The capital of Canada is Ottawa.", "What do bees make?": "Bees make honey."}


LUMORA = {f"What is the {what} of Lumora?": f"Lumora's {what} is {answer}." for what, answer in FACTS.items()}


def rows_of(labels: Mapping[str, str]) -> list[dict[str, Any]]:
    """And the two that are held."""
    asked = [("label", *pair) for pair in labels.items()] + [("replay", *pair) for pair in KEPT.items()]
    return [
        {
            "id": f"row-{number}",
            "kind": kind,
            "messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}],
        }
        for number, (kind, question, answer) in enumerate(asked)
    ]


def _prepare(folder: Path, base_dir: Path, rows: list[dict[str, Any]] | None = None, **changed: Any) -> TrainSpec:
    """Rows and spec.json in `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows or rows_of(LUMORA)))
    fields: dict[str, Any] = {
        "base_dir": base_dir,
        "base_name": "served-base",
        "base_digest": "sha256:0",
        "data_dir": folder,
        "out_dir": folder,
        "lora": {"rank": 4, "alpha": 8},
        "schedule": {
            **{"learning_rate": 2e-3, "max_steps": 8, "batch_size": 6, "epochs": 100, "save_steps": 2},
            "finish_share": 0.5,
        },
    }
    spec = TrainSpec.model_validate(fields | changed)
    write_spec(spec, folder / "spec.json")
    return spec


async def _train(folder: Path, on_progress: Callable[[dict[str, Any]], None], module: str = "peft") -> None:
    await LocalExecutor().run(
        f"loop.trainers.{module}",
        folder / "spec.json",
        on_progress=on_progress,
        log_path=folder / "trainer.log",
        environment={},
    )


def trainers_of(parent: int) -> list[int]:
    """Trainer processes that were started by this process id."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            words = path.read_bytes().split(b"\0")
            if b"--parent" in words and words[words.index(b"--parent") + 1] == str(parent).encode():
                found.append(int(path.parent.name))
    return found


async def _gone(process: int, within_seconds: float = 5.0) -> bool:
    until = time.monotonic() + within_seconds
    while Path(f"/proc/{process}").exists() and "Z" not in Path(f"/proc/{process}/stat").read_text().split()[2]:
        if time.monotonic() > until:
            return False
        await asyncio.sleep(0.05)
    return True


@pytest.fixture(scope="module")
def tiny_dir(smollm2_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model of two small layers with the real one's tokenizer: for everything but learning."""
    folder = tmp_path_factory.mktemp("tiny")
    config = LlamaConfig.from_pretrained(smollm2_dir)
    config.update({"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "head_dim": 32})
    config.update({"num_attention_heads": 2, "num_key_value_heads": 1})
    torch.manual_seed(0)
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json"):
        shutil.copy(smollm2_dir / name, folder)
    return folder


@pytest.fixture(scope="module")
def learned(smollm2_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    """The real 135M model, NF4, a few steps; four rows in ten hold the base, so that it takes a few more."""
    folder = tmp_path_factory.mktemp("learned")
    schedule = {"learning_rate": 2e-3, "max_steps": 20, "batch_size": 6, "epochs": 100, "save_steps": 5}
    spec = _prepare(folder, smollm2_dir, schedule=schedule)
    lines: list[dict[str, Any]] = []
    finished_during_training: list[bool] = []

    def note(line: dict[str, Any]) -> None:
        lines.append(line)
        finished_during_training.append((folder / "result.json").exists())

    asyncio.run(_train(folder, note))
    return spec, lines, finished_during_training


async def test_the_loss_falls_and_every_step_is_told(learned: Trained) -> None:
    """One full progress line a step, in order; the model learns the rows."""
    _, lines, _ = learned
    told = [Progress.model_validate(line) for line in lines]
    assert [line.step for line in told] == list(range(1, 21))
    assert {line.total_steps for line in told} == {20}
    assert told[-1].loss < 0.6 * told[0].loss
    assert all(line.tokens_per_s > 0 and line.memory_bytes > 1e8 and line.grad_norm > 0 for line in told)


async def test_the_adapter_is_two_files_for_the_served_base(learned: Trained) -> None:
    """bfloat16 and finite, really trained, without anything that holds code; digests are of these very bytes."""
    spec, _, _ = learned
    adapter, result = spec.out_dir / "adapter", read_result(spec.out_dir)
    assert result is not None
    assert {path.name: f"sha256:{hashlib.sha256(path.read_bytes()).hexdigest()}" for path in adapter.iterdir()} == (
        result.adapter_files
    )
    assert set(result.adapter_files) == {"adapter_config.json", "adapter_model.safetensors"}
    config = json.loads((adapter / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "served-base"
    assert config["target_modules"] == sorted(spec.lora.target_modules)
    weights = load_file(adapter / "adapter_model.safetensors")
    assert len(weights) == 30 * 7 * 2
    assert {weight.dtype for weight in weights.values()} == {torch.bfloat16}
    assert all(weight.abs().sum() > 0 for name, weight in weights.items() if "lora_B" in name)


async def test_the_result_is_written_last(learned: Trained) -> None:
    """While it trains there is none; afterwards it tells what was done, and the checkpoints are gone."""
    spec, lines, finished_during_training = learned
    result = read_result(spec.out_dir)
    assert isinstance(result, TrainResult)
    assert not any(finished_during_training)
    assert (result.steps, result.examples, result.device.split(",")[0]) == (20, 6, "cpu")
    assert result.final_loss == pytest.approx(sum(line["loss"] for line in lines[-10:]) / 10, rel=0.01)
    assert result.packages["trl"]
    assert result.peak_memory_bytes > 1e8
    assert not (spec.out_dir / "checkpoints").exists()


async def test_a_finished_run_is_not_repeated(learned: Trained) -> None:
    """The same spec again: no step, the same result."""
    spec, _, _ = learned
    before = (spec.out_dir / "result.json").stat().st_mtime_ns
    again: list[dict[str, Any]] = []
    await _train(spec.out_dir, again.append)
    assert again == []
    assert (spec.out_dir / "result.json").stat().st_mtime_ns == before


async def test_a_killed_trainer_goes_on_from_its_checkpoint_to_the_same_adapter(tiny_dir: Path, tmp_path: Path) -> None:
    """SIGKILL after step 5: on from the last checkpoint, the losses of an unbroken run step by step, and its bytes."""
    whole, broken = _prepare(tmp_path / "whole", tiny_dir), _prepare(tmp_path / "broken", tiny_dir)
    unbroken: dict[int, dict[str, Any]] = {}
    await _train(whole.out_dir, lambda line: unbroken.__setitem__(line["step"], line))

    def kill_at_five(line: dict[str, Any]) -> None:
        if line["step"] == 5:
            os.kill(trainers_of(os.getpid())[0], signal.SIGKILL)

    with pytest.raises(ChildCrashed, match="killed"):
        await _train(broken.out_dir, kill_at_five)
    assert read_result(broken.out_dir) is None
    tokens = broken.out_dir / token_store.FOLDER
    made = (tokens / token_store.MANIFEST).stat().st_mtime_ns
    resumed: list[dict[str, Any]] = []

    def go_on(line: dict[str, Any]) -> None:
        resumed.append(line)
        assert (tokens / token_store.MANIFEST).stat().st_mtime_ns == made, "rows are not tokenised a second time"

    await _train(broken.out_dir, go_on)
    assert not tokens.exists()
    assert resumed[0]["step"] in {5, 7}
    assert resumed[-1]["step"] == 8
    for line in resumed:
        same = unbroken[line["step"]]
        for figure in ("loss", "grad_norm", "learning_rate"):
            assert line[figure] == same[figure], f"{figure} of step {line['step']}"
    first, second = read_result(whole.out_dir), read_result(broken.out_dir)
    assert first is not None
    assert second is not None
    assert first.adapter_files == second.adapter_files
    assert first.unquantised_steps == second.unquantised_steps == 4


async def test_the_finish_is_on_the_base_that_is_served(tiny_dir: Path, tmp_path: Path) -> None:
    """Adapter off, the exchanged model gives the unquantised base's very logits; quantised, it did not."""
    spec = _prepare(tmp_path, tiny_dir)
    model = peft_backend.load(spec, longest=32)
    served = LlamaForCausalLM.from_pretrained(tiny_dir, dtype=compute_dtype(), attn_implementation="eager")
    tokens = torch.tensor([[1, 504, 216, 30, 2, 7, 99]])
    with torch.no_grad(), model.disable_adapter():
        wanted = served(input_ids=tokens).logits
        assert not torch.equal(model(input_ids=tokens).logits, wanted)
        assert unquantise(model, tiny_dir, compute_dtype()) == 2 * 7
        assert torch.equal(model(input_ids=tokens).logits, wanted)
    assert unquantise(model, tiny_dir, compute_dtype()) == 0


async def test_where_the_served_base_does_not_fit_nothing_is_exchanged(
    tiny_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It finishes on the quantised base, and the result says so."""
    model = peft_backend.load(_prepare(tmp_path, tiny_dir), longest=32)
    monkeypatch.setattr(served_base, "_free_bytes", lambda device: 1000)
    finish = served_base.FinishOnServedBase(model, tiny_dir, compute_dtype(), first_step=4, total=8)
    finish.on_step_begin(None, TrainerState(global_step=4), None)
    assert finish.steps == 0


@contextlib.contextmanager
def parent_of_a_training(folder: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A process that runs the folder's spec as a night does, after its first step."""
    script = (
        "import asyncio, pathlib, sys; from loop.executors import LocalExecutor; folder = pathlib.Path(sys.argv[1]);"
        "asyncio.run(LocalExecutor().run('loop.trainers.peft', folder / 'spec.json', log_path=folder / 'log',"
        "on_progress=lambda line: print(line['step'], flush=True), environment={}))"
    )
    with subprocess.Popen([sys.executable, "-c", script, str(folder)], stdout=subprocess.PIPE) as parent:
        assert parent.stdout is not None
        assert parent.stdout.readline() == b"1\n"
        yield parent


async def test_a_trainer_dies_with_its_killed_parent(tiny_dir: Path, tmp_path: Path) -> None:
    """SIGKILL gives the parent no chance to end its child: the kernel does."""
    _prepare(tmp_path, tiny_dir, schedule={"max_steps": 100_000, "epochs": 1000, "batch_size": 1})
    with parent_of_a_training(tmp_path) as parent:
        (child,) = trainers_of(parent.pid)
        parent.kill()
    assert await _gone(child)


async def test_a_cancelled_caller_leaves_no_trainer(tiny_dir: Path, tmp_path: Path) -> None:
    """The night's worker stops: so does its child, before the cancellation is through."""
    _prepare(tmp_path, tiny_dir, schedule={"max_steps": 100_000, "epochs": 1000, "batch_size": 1})
    running = asyncio.Event()
    task = asyncio.create_task(_train(tmp_path, lambda line: running.set()))
    await asyncio.wait_for(running.wait(), 120)
    (child,) = trainers_of(os.getpid())
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert await _gone(child, within_seconds=0.5)


async def test_long_rows_end_the_run_before_training_by_name(tiny_dir: Path, tmp_path: Path) -> None:
    """The message names them, the log holds no traceback, and nothing is left that looks like an adapter."""
    rows = rows_of(LUMORA)
    rows[2]["messages"][1]["content"] = "Tampere " * 60
    _prepare(tmp_path, tiny_dir, rows, lengths={"max_length": 100})
    with pytest.raises(ChildFailed, match=r"1 of 6 rows .* row-2 \(\d+\)") as failed:
        await _train(tmp_path, lambda line: None)
    assert failed.value.child_code == "bad_rows"
    assert "max_length" in failed.value.hint
    assert "Traceback" not in (tmp_path / "trainer.log").read_text()
    assert not (tmp_path / "adapter").exists()
    assert read_result(tmp_path) is None


async def test_a_loss_that_is_no_number_stops_the_run(tiny_dir: Path, tmp_path: Path) -> None:
    """A base with broken weights never gives an adapter."""
    base = tmp_path / "base"
    shutil.copytree(tiny_dir, base)
    model = LlamaForCausalLM.from_pretrained(base)
    with torch.no_grad():
        model.model.norm.weight.fill_(float("nan"))
    model.save_pretrained(base)
    _prepare(tmp_path, base)
    with pytest.raises(ChildFailed, match="the loss became nan") as failed:
        await _train(tmp_path, lambda line: None)
    assert failed.value.child_code == "training_diverged"
    assert not (tmp_path / "adapter").exists()


async def test_what_is_missing_is_named(tmp_path: Path) -> None:
    """No base, no GPU for Unsloth, no such Python, no such module: each its own words."""
    _prepare(tmp_path, tmp_path / "nowhere")
    with pytest.raises(ChildFailed, match=r"no model at .*nowhere"):
        await _train(tmp_path, lambda line: None)
    (tmp_path / "nowhere").mkdir()
    (tmp_path / "nowhere" / "config.json").write_text("{}")
    if not torch.cuda.is_available():
        with pytest.raises(ChildFailed, match="needs a GPU"):
            await _train(tmp_path, lambda line: None, module="unsloth")
    with pytest.raises(ChildCrashed, match="No module named"):
        await _train(tmp_path, lambda line: None, module="nothing")
    with pytest.raises(ChildNotStarted, match="/no/python"):
        await LocalExecutor().run(
            "loop.trainers.peft",
            tmp_path / "spec.json",
            on_progress=lambda line: None,
            log_path=tmp_path / "log",
            environment={},
            python="/no/python",
        )


async def test_packed_and_padded_runs_learn_the_same(tiny_dir: Path, tmp_path: Path) -> None:
    """The same steps with the same losses; the result says how rows were laid out, and why. 8-bit AdamW trains, too."""
    found = {}
    for packing in ("on", "off"):
        schedule = {"max_steps": 4, "batch_size": 6, "epochs": 100, "optimizer": "adamw_8bit"}
        spec = _prepare(
            tmp_path / packing,
            tiny_dir,
            quantisation="none",
            schedule=schedule,
            lengths={"packing": packing, "at_once": 99},
        )
        lines: list[dict[str, Any]] = []
        await _train(tmp_path / packing, lines.append)
        found[packing] = read_result(spec.out_dir), [line["loss"] for line in lines]
    (on, packed), (off, padded) = found["on"], found["off"]
    assert on is not None
    assert off is not None
    assert (on.packed, on.not_packed) == (True, "")
    assert (off.packed, off.not_packed) == (False, 'trainer.packing = "off"')
    assert packed == pytest.approx(padded, rel=2e-2)
    assert list(on.phases) == ["imported", "loaded", "ready", "tried", "first_step"]
