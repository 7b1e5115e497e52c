"""Several ranks train one adapter: accelerate's own launcher, real processes, gloo in place of a card's NCCL."""

from __future__ import annotations

import asyncio
import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from safetensors.torch import load_file

from loop.executors import ChildControl, ChildCrashed, ChildFailed, LocalExecutor
from loop.process_tree import descendants
from loop.trainers.spec import TrainSpec, read_result
from tests.conftest import ROOT
from tests.integration.test_trainer import LUMORA, _gone, _prepare, parent_of_a_training, rows_of, tiny_dir

__all__ = ["tiny_dir"]  # a fixture
pytestmark = pytest.mark.slow
SCHEDULE = {"learning_rate": 2e-3, "max_steps": 6, "batch_size": 5, "epochs": 100, "save_steps": 2}
LONG = {"learning_rate": 2e-3, "max_steps": 100_000, "batch_size": 4, "epochs": 1000, "save_steps": 100_000}
WAYS = [(2, "replicate", "none"), (2, "fsdp", "none"), (2, "fsdp", "nf4"), (1, "fsdp", "none"), (3, "replicate", "nf4")]


def prepare(folder: Path, base_dir: Path, gpus: int = 1, sharding: str = "auto", **changed: Any) -> TrainSpec:
    cards = {"gpus": gpus, "sharding": sharding}
    changed = {"schedule": SCHEDULE, "quantisation": "none", "threads": 1, **changed}
    return _prepare(folder, base_dir, cards=cards, **changed)


async def train(
    folder: Path,
    on_progress: Callable[[dict[str, Any]], None] = lambda line: None,
    on_start: Callable[[ChildControl], None] = lambda control: None,
) -> None:
    await LocalExecutor().run(
        "loop.trainers.peft",
        folder / "spec.json",
        on_progress=on_progress,
        log_path=folder / "trainer.log",
        environment={},
        on_start=on_start,
    )


def adapter(spec: TrainSpec) -> dict[str, torch.Tensor]:
    return {
        name: weight.float() for name, weight in load_file(spec.out_dir / "adapter/adapter_model.safetensors").items()
    }


def away(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    """Relative, over all weights."""
    assert one.keys() == other.keys()
    difference = sum(float((one[name] - other[name]).square().sum()) for name in one)
    return float((difference / sum(float(weight.square().sum()) for weight in one.values())) ** 0.5)


def ranks_below(process: int) -> list[int]:
    return [one for one in descendants(process) if b"--parent" in Path(f"/proc/{one}/cmdline").read_bytes()]


@pytest.mark.parametrize(("gpus", "sharding", "quantisation"), WAYS)
async def test_several_ranks_make_the_adapter_of_one(
    tiny_dir: Path, tmp_path: Path, gpus: int, sharding: str, quantisation: str
) -> None:
    """The same losses, gradient norms and learning rates at each step, and the same weights, but for rounding; with
    parts of steps, replay held by KL, and more ranks than some steps have rows."""
    changed: dict[str, Any] = {"quantisation": quantisation, "memory": {"micro_tokens": 60}}
    alone = prepare(tmp_path / "alone", tiny_dir, **changed)
    several = prepare(tmp_path / "several", tiny_dir, gpus, sharding, **changed)
    lines: dict[str, list[dict[str, Any]]] = {"alone": [], "several": []}
    await train(alone.out_dir, lines["alone"].append)
    await train(several.out_dir, lines["several"].append)
    for one, other in zip(lines["alone"], lines["several"], strict=True):
        for figure in ("step", "loss", "grad_norm", "learning_rate"):
            assert other[figure] == pytest.approx(one[figure], rel=2e-2), f"{figure} of step {one['step']}"
    assert away(adapter(alone), adapter(several)) < 0.01
    result = read_result(several.out_dir)
    assert result is not None
    assert (result.steps, result.gpus, result.sharding) == (6, gpus, sharding)
    assert result.memory is not None
    assert result.memory.plan.micro_batches > 1, "in parts"
    assert result.tokens == read_result(alone.out_dir).tokens  # type: ignore[union-attr]
    assert len([line for line in lines["several"] if line["step"] == 1]) == 1


async def _kill_at(spec: TrainSpec, step: int, whom: Callable[[], int]) -> None:
    """One process, with SIGKILL, after that step: the run ends as if it had been the only one."""
    gone: list[int] = []

    def kill(line: dict[str, Any]) -> None:
        if line["step"] == step:
            gone.extend(ranks_below(os.getpid()))
            os.kill(whom(), signal.SIGKILL)

    with pytest.raises(ChildCrashed, match="killed"):
        await train(spec.out_dir, kill)
    assert len(gone) == 1 + spec.cards.gpus
    assert all([await _gone(process) for process in gone])
    assert read_result(spec.out_dir) is None


@pytest.mark.parametrize("sharding", ["replicate", "fsdp"])
async def test_killed_ranks_go_on_to_the_same_adapter(tiny_dir: Path, tmp_path: Path, sharding: str) -> None:
    """The launcher killed, then a rank: each time nothing is left, and the next start goes on from the checkpoint, to
    the bytes of an unbroken run. Dropout of an adapter is drawn again as it was."""
    lora = {"rank": 4, "alpha": 8, "dropout": 0.1}
    whole = prepare(tmp_path / "whole", tiny_dir, 2, sharding, lora=lora)
    broken = prepare(tmp_path / "broken", tiny_dir, 2, sharding, lora=lora)
    await train(whole.out_dir)
    await _kill_at(broken, 3, lambda: ranks_below(os.getpid())[0])
    await _kill_at(broken, 5, lambda: ranks_below(os.getpid())[2])
    steps: list[int] = []
    await train(broken.out_dir, lambda line: steps.append(line["step"]))
    assert steps[0] in {3, 5}
    assert read_result(whole.out_dir).adapter_files == read_result(broken.out_dir).adapter_files  # type: ignore[union-attr]


async def test_a_run_goes_on_with_another_number_of_ranks(tiny_dir: Path, tmp_path: Path) -> None:
    """A checkpoint holds no part of a rank: begun by two, ended by one."""
    alone, begun = prepare(tmp_path / "alone", tiny_dir), prepare(tmp_path / "begun", tiny_dir, 2)
    await train(alone.out_dir)
    await _kill_at(begun, 5, lambda: ranks_below(os.getpid())[0])
    ended = prepare(tmp_path / "begun", tiny_dir)
    steps: list[int] = []
    await train(ended.out_dir, lambda line: steps.append(line["step"]))
    assert steps[0] > 1
    assert away(adapter(alone), adapter(ended)) < 0.02


async def test_ranks_die_with_their_killed_parent(tiny_dir: Path, tmp_path: Path) -> None:
    """Of the launcher: SIGKILL gives it no chance to end them."""
    prepare(tmp_path, tiny_dir, 2, schedule=LONG)
    with parent_of_a_training(tmp_path) as parent:
        below = ranks_below(parent.pid)
        parent.kill()
    assert len(below) == 3
    assert all([await _gone(process) for process in below])


async def test_parked_paused_and_ended_as_one(tiny_dir: Path, tmp_path: Path) -> None:
    """A pause stops every rank, though each leads a group of its own; parked, they end together at a checkpoint and
    go on from it; cancelled, none is left. All that listens does so on the loopback interface."""
    prepare(tmp_path, tiny_dir, 2, schedule=LONG)
    controls: list[ChildControl] = []
    steps: list[int] = []
    task = asyncio.create_task(train(tmp_path, lambda line: steps.append(line["step"]), controls.append))
    while len(steps) < 2 and not task.done():
        await asyncio.sleep(0.05)
    below = ranks_below(os.getpid())
    assert len(below) == 3
    heard = {
        connection.laddr.ip
        for process in below
        for connection in psutil.Process(process).net_connections()
        if connection.status == psutil.CONN_LISTEN
    }
    assert heard <= {"127.0.0.1", "::1"}, heard
    controls[0].pause()
    await asyncio.sleep(0.5)
    assert {psutil.Process(process).status() for process in below} == {psutil.STATUS_STOPPED}
    at = len(steps)
    await asyncio.sleep(0.5)
    assert len(steps) == at
    controls[0].park()
    with pytest.raises(ChildFailed, match="give the machine back, after step") as parked:
        await asyncio.wait_for(task, 400)
    assert parked.value.child_code == "parked"
    assert all([await _gone(process) for process in below])
    assert (tmp_path / "checkpoints" / f"checkpoint-{steps[-1]}" / "complete").exists()
    last = steps[-1]
    steps.clear()
    task = asyncio.create_task(train(tmp_path, lambda line: steps.append(line["step"])))
    while not steps and not task.done():
        await asyncio.sleep(0.05)
    below = ranks_below(os.getpid())
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert steps[0] == last + 1
    assert all([await _gone(process, within_seconds=1) for process in below])


async def test_parking_reaches_ranks_that_are_not_there_yet(tiny_dir: Path, tmp_path: Path) -> None:
    """Told while the launcher starts: the ranks hear of it after their first step."""
    prepare(tmp_path, tiny_dir, 2, schedule=LONG)
    controls: list[ChildControl] = []
    task = asyncio.create_task(train(tmp_path, on_start=controls.append))
    while not controls or not controls[0].park():
        await asyncio.sleep(0.01)
    with pytest.raises(ChildFailed, match="give the machine back") as parked:
        await asyncio.wait_for(task, 400)
    assert parked.value.child_code == "parked"


COUNTS = """
import os
if os.environ.get("RANK") == "0":
    from loop.trainers.team import Team
    most = Team.most
    def counting(self, number):
        import gc, json, torch
        from torch.distributed.tensor import DTensor
        shared = [one for one in gc.get_objects() if type(one) is torch.nn.Parameter or issubclass(type(one), DTensor)]
        shared = [one for one in shared if isinstance(one, DTensor) and isinstance(one, torch.nn.Parameter)]
        with open(os.environ["COUNTED"], "w") as file:
            json.dump([sum(one.to_local().numel() for one in shared), sum(one.numel() for one in shared)], file)
        return most(self, number)
    Team.most = counting
"""


async def test_each_rank_keeps_half_of_the_layers(tiny_dir: Path, tmp_path: Path) -> None:
    """Of all weights of all layers; nothing else is shared out, and no layer is left gathered."""
    spec = prepare(tmp_path / "run", tiny_dir, 2, "fsdp")
    (tmp_path / "sitecustomize.py").write_text(COUNTS)
    await LocalExecutor().run(
        "loop.trainers.peft",
        spec.out_dir / "spec.json",
        on_progress=lambda line: None,
        log_path=spec.out_dir / "trainer.log",
        environment={"PYTHONPATH": f"{tmp_path}:{ROOT}", "COUNTED": str(tmp_path / "counted.json")},
    )
    kept, whole = json.loads((tmp_path / "counted.json").read_text())
    weights = load_file(tiny_dir / "model.safetensors")
    assert whole == sum(weight.numel() for name, weight in weights.items() if ".layers." in name)
    assert kept * 2 == whole


FAILS = """
import os
if os.environ.get("RANK") == "1":
    from loop.trainers.team import Team
    agree, asked = Team.agree, []
    def failing(self, numbers):
        asked.append(numbers)
        if len(asked) == 3:
            raise MemoryError("can't allocate memory for the third step")
        return agree(self, numbers)
    Team.agree = failing
"""


async def test_what_one_rank_says_is_told_once_and_all_end(tiny_dir: Path, tmp_path: Path) -> None:
    """Out of memory on the second rank: its own error line, not the first one's, which only sees it leave."""
    spec = prepare(tmp_path / "run", tiny_dir, 2)
    (tmp_path / "sitecustomize.py").write_text(FAILS)
    with pytest.raises(ChildFailed, match="third step") as failed:
        await LocalExecutor().run(
            "loop.trainers.peft",
            spec.out_dir / "spec.json",
            on_progress=lambda line: None,
            log_path=spec.out_dir / "trainer.log",
            environment={"PYTHONPATH": f"{tmp_path}:{ROOT}"},
        )
    assert failed.value.child_code == "out_of_memory"
    assert ranks_below(os.getpid()) == []
    assert read_result(spec.out_dir) is None


async def test_a_mistake_in_the_rows_is_one_error_line_of_all(tiny_dir: Path, tmp_path: Path) -> None:
    rows = rows_of(LUMORA)
    rows[2]["messages"][1]["content"] = "Tampere " * 60
    prepare(tmp_path, tiny_dir, 2, rows=rows, lengths={"max_length": 100})
    with pytest.raises(ChildFailed, match=r"1 of 6 rows .* row-2") as failed:
        await train(tmp_path)
    assert failed.value.child_code == "bad_rows"


async def test_no_time_left_ends_all_ranks_at_the_same_step(tiny_dir: Path, tmp_path: Path) -> None:
    """The first rank's clock decides; the adapter is whole and the result says so."""
    schedule = {**LONG, "max_steps": 100_000}
    spec = prepare(tmp_path, tiny_dir, 2, schedule=schedule, limits={"seconds": 25})
    await asyncio.wait_for(train(tmp_path), 400)
    result = read_result(spec.out_dir)
    assert result is not None
    assert result.time_limited
    assert 0 < result.steps < 100_000
    assert result.memory is not None
    assert result.memory.machine == "2 x host memory"
