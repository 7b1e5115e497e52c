"""A training under watch with the real tiny trainer: what alarms, limits and a truce do to a child that runs."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import signal
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import date
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import structlog
import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from labeling.database import Database
from loop.executors import ChildFailed
from loop.settings import EngineSettings, ProjectSettings
from loop.stage import StageContext
from loop.trainers.checkpoints import CHECKPOINTS
from loop.trainers.spec import TrainResult, TrainSpec, read_result, write_spec
from loop.vllm import Replica
from loop.watch import supervise
from loop.watch.sensors import NoReadings, RecordedSensors, Sensors
from loop.watch.supervise import StoppedByAlarm, Supervisor, TookTooLong
from loop.watch.usage import Usage
from tests.fakes.vllm import FakeVllm
from tests.integration.test_trainer import tiny_dir, trainers_of
from tests.running import offline_clients

__all__ = ["tiny_dir"]  # a fixture
pytestmark = pytest.mark.slow
SURE = {"max_steps": 24, "batch_size": 1, "epochs": 2, "save_steps": 2, "learning_rate": 2e-2, "scheduler": "constant"}


@pytest.fixture(scope="module")
def sure_dir(tiny_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same with a head that is sure of itself: what it has not learnt yet costs it dearly."""
    folder = tmp_path_factory.mktemp("sure") / "base"
    shutil.copytree(tiny_dir, folder)
    model = untied(folder)
    with torch.no_grad():
        model.lm_head.weight.mul_(30)
    model.save_pretrained(folder)
    return folder


def untied(folder: Path) -> Any:
    """A random model of that folder's form whose head is not its embedding."""
    config = LlamaConfig.from_pretrained(folder)
    config.tie_word_embeddings = False
    torch.manual_seed(0)
    return LlamaForCausalLM(config).to(torch.bfloat16)


def row(number: int, answer: str) -> dict[str, Any]:
    asked = [{"role": "user", "content": "What is it?"}, {"role": "assistant", "content": answer}]
    return {"id": f"row-{number}", "kind": "label", "messages": asked}


@dataclass
class Watched:
    """One training of the tiny model under the supervisor, and what was seen of it."""

    folder: Path
    base_dir: Path
    trainer: dict[str, Any]
    sensors: Sensors = field(default_factory=NoReadings)
    rows: list[dict[str, Any]] = field(default_factory=lambda: [row(number, "Tampere") for number in range(12)])
    limits: dict[str, Any] = field(default_factory=dict)
    method: dict[str, Any] = field(default_factory=dict)  # of the spec: method, preference
    lines: list[dict[str, Any]] = field(default_factory=list)
    steps: list[dict[str, Any]] = field(default_factory=list)
    events: list[tuple[str, dict[str, Any]]] = field(default_factory=list)
    usage: Usage = field(default_factory=Usage)
    replicas: tuple[Replica, ...] = ()
    on_step: Callable[[dict[str, Any]], None] = lambda line: None

    async def train(self) -> TrainResult | None:
        (self.folder / "train.jsonl").write_text("".join(json.dumps(one) + "\n" for one in self.rows))
        schedule = {**SURE, **{key: self.trainer[key] for key in SURE if key in self.trainer}}
        spec = TrainSpec.model_validate(
            {
                "base_dir": self.base_dir,
                "base_name": "served-base",
                "base_digest": "sha256:0",
                "data_dir": self.folder,
                "out_dir": self.folder / "out",
                "quantisation": "none",
                "lora": {"rank": 4, "alpha": 8},
                "schedule": schedule,
                "limits": self.limits,
                **self.method,
                "threads": 1,
            }
        )
        write_spec(spec, self.folder / "spec.json")
        project = ProjectSettings(name="p", base_dir=self.base_dir, base_name="base", trainer=self.trainer)
        database = Database(f"sqlite+aiosqlite:///{self.folder}/test.db")
        context = StageContext(
            night_id="ni",
            project=project,
            engine=EngineSettings(),
            date=date(2026, 1, 1),
            folder=self.folder,
            data_dir=self.folder,
            clients=offline_clients(database, self.folder, self.replicas),
            log=structlog.get_logger(),
            progress=lambda line: None,
            inputs={},
            record=self._record,
        )
        try:
            await Supervisor(context, spec, "run", self.sensors, self.usage, self._show).train()
        finally:
            await database.close()
        return read_result(spec.out_dir)

    async def _record(self, kind: str, detail: dict[str, Any]) -> None:
        self.events.append((kind, detail))

    def _show(self, line: dict[str, Any]) -> None:
        self.lines.append(line)
        if "step" in line and (not self.steps or line["elapsed_s"] != self.steps[-1]["elapsed_s"]):
            self.steps.append(line)
            self.on_step(line)

    @property
    def alarms(self) -> list[dict[str, Any]]:
        raised = [detail for kind, detail in self.events if kind == "alarm" and not detail["over"]]
        return [{"kind": detail["alarm"], **detail} for detail in raised]


@pytest.fixture(params=["lora", "full"])
def finetuning(request: pytest.FixtureRequest) -> dict[str, Any]:
    """What is trained: of the spec. A layer's own weights move further than a small adapter does at the same rate."""
    return {"finetuning_type": request.param}


def recording(folder: Path, **values: Any) -> RecordedSensors:
    """The same reading for as long as anybody asks."""
    path = folder / "readings.jsonl"
    path.write_text((json.dumps({"device": "card", **values}) + "\n") * 10_000)
    return RecordedSensors(path)


def trainer_of(process: int) -> int:
    found = trainers_of(process)
    assert found, "no trainer runs"
    return found[0]


async def test_a_spike_rolls_back_to_the_checkpoint_before_it_at_half_the_rate(
    sure_dir: Path, finetuning: dict[str, Any], tmp_path: Path
) -> None:
    """Eleven rows alike are learnt at once; the twelfth is another text: its loss is the spike of the second pass.

    The run goes on from the last checkpoint before the spike, the later one is gone, the rate is halved, and result,
    events and usage say so.
    """
    alarms = {
        "loss_spike": {"window_steps": 20, "steps": 1, "deviations": 5},
        "gradient_norm": {"action": "off"},
        "max_roll_backs": 1,
        "sensor_seconds": 0.2,
    }
    slower = {"learning_rate": 5e-3, "epochs": 4, "max_steps": 30}
    rows = [*(row(number, "Tampere") for number in range(11)), row(11, "zxq vrk wpl jjy qqf bnm tzz")]
    watched = Watched(tmp_path, sure_dir, {"alarms": alarms, **SURE, **slower}, rows=rows, method=finetuning)
    result = await watched.train()
    assert result is not None
    (alarm,) = watched.alarms
    assert (alarm["kind"], alarm["action"]) == ("loss_spike", "roll_back")
    pairs = enumerate(pairwise(watched.steps), 1)
    again = next(number for number, (one, two) in pairs if two["step"] <= one["step"])
    first = watched.steps[again]
    assert first["step"] <= alarm["onset_step"] + 1
    assert first["step"] > alarm["onset_step"] - 2, "the last checkpoint before it, not an earlier one"
    assert first["learning_rate"] == pytest.approx(0.5 * 5e-3)
    assert result.rate_scale == 0.5
    assert (result.steps, watched.usage.roll_backs) == (30, 1)


async def test_an_alarm_that_stops_ends_the_training_with_its_cure(tiny_dir: Path, tmp_path: Path) -> None:
    """A card at 97 C with action stop: no result, no trainer left, the reason in words; checkpoints stay."""
    alarms = {"temperature": {"action": "stop", "seconds": 3}, "sensor_seconds": 0.2}
    settings = {"alarms": alarms, **SURE, "max_steps": 100_000, "epochs": 1000}
    watched = Watched(tmp_path, tiny_dir, settings, recording(tmp_path, temperature_c=97.0, power_w=300.0))
    with pytest.raises(StoppedByAlarm, match="temperature: 97 C, above 85 C") as stopped:
        await watched.train()
    assert "airflow" in stopped.value.hint
    assert read_result(tmp_path / "out") is None
    with pytest.raises(AssertionError, match="no trainer"):
        trainer_of(os.getpid())
    assert [alarm["kind"] for alarm in watched.alarms] == ["temperature"]
    assert Usage.read(tmp_path).highest_temperature_c == 97


async def test_a_disk_that_is_full_from_the_start_stops_at_once(tiny_dir: Path, tmp_path: Path) -> None:
    """Raised before any trainer runs: it stops all the same."""
    watched = Watched(tmp_path, tiny_dir, {"alarms": {"disk_filling": {"free_gb": 99_999}}, **SURE})
    with pytest.raises(StoppedByAlarm, match=r"disk filling: .* less than 99999 GB"):
        await watched.train()
    assert watched.steps == []


async def test_heat_slows_the_trainer_and_it_still_finishes(tiny_dir: Path, tmp_path: Path) -> None:
    """slow_down: the child is stopped part of the time, the lines say why, and the result is there."""
    alarms = {"temperature": {"seconds": 0}, "sensor_seconds": 0.2}
    watched = Watched(tmp_path, tiny_dir, {"alarms": alarms, **SURE}, recording(tmp_path, temperature_c=97.0))
    assert await watched.train() is not None
    assert any(line.get("slowed_by") == "temperature" for line in watched.lines)
    assert any("temperature: 97 C" in " ".join(line.get("alarms", ())) for line in watched.lines)


async def test_a_trainer_that_hangs_is_started_again_where_it_stood(tiny_dir: Path, tmp_path: Path) -> None:
    """Stopped from outside after step 9: the watchdog ends it, and step 8's checkpoint goes on, at the same rate."""

    def hang(line: dict[str, Any]) -> None:
        if line["step"] == 9 and not watched.usage.restarts:
            os.killpg(trainer_of(os.getpid()), signal.SIGSTOP)

    alarms = {"no_progress": {"seconds": 25}, "sensor_seconds": 0.2}
    watched = Watched(tmp_path, tiny_dir, {"alarms": alarms, **SURE})
    watched.on_step = hang
    result = await watched.train()
    assert result is not None
    assert (result.steps, result.rate_scale, watched.usage.restarts) == (24, 1.0, 1)
    assert [alarm["kind"] for alarm in watched.alarms] == ["no_progress"]
    steps = [line["step"] for line in watched.steps]
    assert 9 in steps[: steps.index(9) + 1]
    assert steps[steps.index(9) + 1] in {9, 10, 11}


async def test_a_broken_base_is_no_alarm(tiny_dir: Path, tmp_path: Path) -> None:
    """A loss that is no number before the first step: nothing to roll back to, the trainer's own error stands."""
    base = tmp_path / "base"
    shutil.copytree(tiny_dir, base)
    model = LlamaForCausalLM.from_pretrained(base)
    with torch.no_grad():
        model.model.norm.weight.fill_(float("nan"))
    model.save_pretrained(base)
    watched = Watched(tmp_path, base, {**SURE})
    with pytest.raises(ChildFailed, match="the loss became nan"):
        await watched.train()
    assert watched.alarms == []


async def test_a_nan_in_the_middle_rolls_back_and_then_gives_up(tiny_dir: Path, tmp_path: Path) -> None:
    """One row's word has a broken embedding: twice from the checkpoint before, then the night fails and says why."""
    base = tmp_path / "base"
    shutil.copytree(tiny_dir, base)
    model = untied(base)
    with torch.no_grad():
        for token in AutoTokenizer.from_pretrained(base)("Q", add_special_tokens=False)["input_ids"]:
            model.model.embed_tokens.weight[token].fill_(float("nan"))
    model.save_pretrained(base)
    rows = [*(row(number, "Tampere and more of it") for number in range(11)), row(11, "Q")]
    watched = Watched(tmp_path, base, {"alarms": {"sensor_seconds": 0.2}, **SURE}, rows=rows)
    with pytest.raises(StoppedByAlarm, match=r"not a number: the loss became nan .*after 2 roll backs"):
        await watched.train()
    assert [alarm["kind"] for alarm in watched.alarms] == ["not_a_number"] * 3
    assert watched.usage.roll_backs == 2


async def test_a_run_that_is_short_of_time_ends_with_an_adapter(tiny_dir: Path, tmp_path: Path) -> None:
    """Steps for hours, a minute allowed: the rate comes down, the adapter is there, and the result says why so few."""
    settings = {**SURE, "max_steps": 100_000, "epochs": 1000, "save_steps": 100_000, "hours_allowed": 60 / 3600}
    watched = Watched(tmp_path, tiny_dir, settings, limits={"save_minutes": 0.05})
    result = await watched.train()
    assert result is not None
    assert result.time_limited
    assert result.planned_steps is not None
    assert result.steps < result.planned_steps
    assert set(result.adapter_files) == {path.name for path in (tmp_path / "out" / "adapter").iterdir()}
    rates = [line["learning_rate"] for line in watched.steps]
    assert rates[-1] < 0.2 * max(rates)
    assert watched.steps[-1]["time_limited"]


async def test_a_trainer_that_does_not_end_in_time_fails_by_name(
    tiny_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Still loading its model when the hours and the grace are over: ended, and nothing is left."""
    monkeypatch.setattr(supervise, "GRACE_SECONDS", 0.5)
    watched = Watched(tmp_path, tiny_dir, {**SURE, "hours_allowed": 1 / 3600})
    with pytest.raises(TookTooLong, match="hours_allowed"):
        await watched.train()
    with pytest.raises(AssertionError, match="no trainer"):
        trainer_of(os.getpid())


async def test_checkpoints_come_by_the_clock_and_the_old_ones_go(tiny_dir: Path, tmp_path: Path) -> None:
    """save_steps never comes; by minutes there is one, and never more than two."""
    seen: set[str] = set()
    folder = tmp_path / "out" / CHECKPOINTS
    kept = 0

    def look(line: dict[str, Any]) -> None:
        nonlocal kept
        there = {path.name for path in folder.glob("checkpoint-*")} if folder.exists() else set()
        seen.update(there)
        kept = max(kept, len(there))

    settings = {**SURE, "max_steps": 150, "epochs": 100, "save_steps": 100_000}
    watched = Watched(tmp_path, tiny_dir, settings, limits={"save_minutes": 0.002})
    watched.on_step = look
    assert await watched.train() is not None
    assert len(seen) >= 3
    assert kept <= 3, "two, and the one that is being written"


async def test_parked_it_writes_a_checkpoint_and_goes_on_from_there(
    tiny_dir: Path, finetuning: dict[str, Any], tmp_path: Path
) -> None:
    """SIGUSR1, as a truce sends it: the step that runs is kept, and the next start goes on after it."""

    def park(line: dict[str, Any]) -> None:
        if line["step"] == 5:
            os.kill(trainer_of(os.getpid()), signal.SIGUSR1)

    watched = Watched(tmp_path, tiny_dir, {**SURE, "save_steps": 1000}, method=finetuning)
    watched.on_step = park
    with pytest.raises(ChildFailed, match="give the machine back") as parked:
        await watched.train()
    assert parked.value.child_code == "parked"
    last = watched.steps[-1]["step"]
    again = Watched(tmp_path, tiny_dir, {**SURE, "save_steps": 1000}, method=finetuning)
    result = await again.train()
    assert result is not None
    assert again.steps[0]["step"] == last + 1
    assert result.steps == 24


async def test_cancelled_it_leaves_nothing_behind_even_while_paused(tiny_dir: Path, tmp_path: Path) -> None:
    """The worker stops while the trainer is slowed: it is gone with it."""
    running = asyncio.Event()
    alarms = {"temperature": {"seconds": 0}, "slow_down_share": 0.4, "sensor_seconds": 0.2}
    settings = {"alarms": alarms, **SURE, "max_steps": 100_000, "epochs": 1000}
    watched = Watched(tmp_path, tiny_dir, settings, recording(tmp_path, temperature_c=97.0))
    watched.on_step = lambda line: running.set()
    task = asyncio.create_task(watched.train())
    await asyncio.wait_for(running.wait(), 500)
    child = trainer_of(os.getpid())
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert not Path(f"/proc/{child}").exists()


@pytest.mark.parametrize("when_broken", ["pause", "stop"])
async def test_production_comes_first_and_training_goes_on_after_it(
    tiny_dir: Path, tmp_path: Path, when_broken: str
) -> None:
    """The replica's first tokens get slow while it trains: no step until they are quick again, then to the end.

    pause keeps the process; stop ends it after a checkpoint, and another one goes on behind it.
    """
    truce = {"latency_seconds": 0.2, "poll_seconds": 0.3, "quiet_seconds": 1.5, "when_broken": when_broken}
    settings = {**SURE, "max_steps": 400, "epochs": 100, "save_steps": 10_000, "truce": truce}
    processes: set[int] = set()
    async with FakeVllm() as fake:
        replica = Replica(fake.url)
        alarms = {"throughput": {"action": "off"}, "sensor_seconds": 0.2}  # other tests share the machine
        watched = Watched(tmp_path, tiny_dir, {**settings, "alarms": alarms}, replicas=(replica,))
        slow = asyncio.Event()

        def seen(line: dict[str, Any]) -> None:
            processes.add(trainer_of(os.getpid()))
            if line["step"] == 20:
                slow.set()

        async def serve() -> None:
            while True:
                fake.first_tokens += [0.7 if slow.is_set() else 0.03] * 20
                await asyncio.sleep(0.1)

        watched.on_step = seen
        serving, training = asyncio.create_task(serve()), asyncio.create_task(watched.train())
        async with asyncio.timeout(300):
            while not any("truce" in detail for kind, detail in watched.events if kind == "note"):
                await asyncio.sleep(0.05)
                assert not training.done()
            await asyncio.sleep(2)
            before = len(watched.steps)
            await asyncio.sleep(2)
            assert len(watched.steps) == before, "it stands still while production needs the machine"
            slow.clear()
            result = await training
        serving.cancel()
        await replica.close()
    assert result is not None
    assert result.steps == 400
    steps = [line["step"] for line in watched.steps]
    assert steps == list(range(1, 401)), "no step is lost, none is done twice"
    assert len(processes) == (1 if when_broken == "pause" else 2)
    assert any("paused for production" in note for note in watched.usage.notes)
    assert watched.alarms == []
