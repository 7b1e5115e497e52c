"""A truce on one GPU: vLLM answers under load while a trainer works beside it, waits, gives its memory back, goes on.

    python deploy/gpu-bench/truce_on_card.py --serve BASE_DIR --train BASE_DIR [--out DIR] [--minutes 9]

Needs vLLM and the trainer's backend in this Python. The product's own parts do it: its engine with sleep mode, its
trainer's process, the truce's own look at vLLM's /metrics, signals to pause and to park. One JSON line a figure on
stdout and in OUT/figures.jsonl. Losses of the training that was interrupted are held to one that was not.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import signal
import statistics
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parents[1]))

import shapes  # noqa: E402 - beside this file, and after the repository is on the path
from figures import rounded, tell  # noqa: E402

from labeling.errors import NightschoolError  # noqa: E402
from loop.adapter_files import base_digest  # noqa: E402
from loop.examination_engine import own_engine  # noqa: E402
from loop.executors import ChildControl, ChildCrashed, ChildFailed, LocalExecutor, trainer_caches  # noqa: E402
from loop.settings import LINEAR_LAYERS, EngineSettings, ProjectSettings  # noqa: E402
from loop.trainers.spec import TrainSpec, write_spec  # noqa: E402
from loop.vllm import Replica  # noqa: E402
from loop.watch.sensors import open_sensors  # noqa: E402
from loop.watch.settings import TruceSettings  # noqa: E402
from loop.watch.truce import Truce  # noqa: E402

AT_ONCE, ANSWER_TOKENS = 8, 16
STEPS, LENGTH, ROWS = 24, 4096, 2
PARTS = ("sleep", "interrupted", "kept")
PROMPT = "Say in one sentence what a library lends, and to whom."


@dataclass
class Load:
    """Requests without a pause, `AT_ONCE` of them in flight; each is counted where it ends."""

    replica: Replica
    model: str
    took: list[float] = field(default_factory=list)
    failed: int = 0
    warm: asyncio.Event = field(default_factory=asyncio.Event)  # the first answers wait for kernels

    @asynccontextmanager
    async def going(self) -> AsyncIterator[None]:
        askers = [asyncio.create_task(self._ask(number)) for number in range(AT_ONCE)]
        try:
            yield
        finally:
            for asker in askers:
                asker.cancel()
            await asyncio.gather(*askers, return_exceptions=True)

    async def _ask(self, number: int) -> None:
        while True:
            try:
                messages = [{"role": "user", "content": f"{number}. {PROMPT}"}]
                answer = await self.replica.ask(self.model, messages, max_tokens=ANSWER_TOKENS)
                self.took.append(answer.seconds)
                if len(self.took) >= 2 * AT_ONCE:
                    self.warm.set()
            except NightschoolError:
                self.failed += 1
                await asyncio.sleep(0.1)

    async def during(self, seconds: float) -> dict[str, Any]:
        """Of the answers that end in the next `seconds`: how long they took."""
        before = len(self.took)
        await asyncio.sleep(seconds)
        return self.since(before)

    def since(self, before: int) -> dict[str, Any]:
        took = self.took[before:]
        if len(took) < 20:
            return {"answers": len(took)}
        return {
            "answers": len(took),
            "p50_ms": 1000 * statistics.median(took),
            "p95_ms": 1000 * statistics.quantiles(took, n=20)[-1],
        }


class Trainer:
    """One training, however often it is begun again. `losses` are by step: a step told twice counts as last told."""

    def __init__(self, spec: TrainSpec, backend: str, folder: Path) -> None:
        self._spec, self._backend, self._folder = spec, backend, folder
        self.losses: dict[int, float] = {}
        self.elapsed_s = 0.0  # of the process that runs, at its last step
        self.control: ChildControl | None = None
        self.task: asyncio.Task[None] | None = None

    def start(self) -> None:
        write_spec(self._spec, self._folder / "spec.json")
        self.task = asyncio.create_task(self._run())

    async def _run(self) -> None:
        passed_on = {name: os.environ[name] for name in ("PYTHONPATH",) if name in os.environ}
        await LocalExecutor().run(
            f"loop.trainers.{self._backend}",
            self._folder / "spec.json",
            on_progress=self._told,
            log_path=self._folder / "trainer.log",
            environment=passed_on | trainer_caches(self._folder.parent),
            on_start=self._started,
        )

    def _told(self, line: dict[str, Any]) -> None:
        if "step" in line:
            self.losses[line["step"]] = line["loss"]
            self.elapsed_s = line["elapsed_s"]

    def _started(self, control: ChildControl) -> None:
        self.control = control

    @property
    def running(self) -> ChildControl:
        assert self.control is not None, "the trainer has been started"
        return self.control

    async def step(self, number: int) -> None:
        """Until that step is told; raises as the trainer's process does."""
        assert self.task is not None
        while max(self.losses, default=0) < number:
            if self.task.done():
                await self.task
                raise RuntimeError(f"the trainer ended before step {number}")
            await asyncio.sleep(0.02)

    async def ended(self, *expected: type[NightschoolError]) -> float:
        """Seconds until then."""
        assert self.task is not None
        since = time.monotonic()
        with contextlib.suppress(*expected):
            await self.task
        return time.monotonic() - since


@dataclass
class Card:
    """What is measured on it, and where the figures go."""

    given: argparse.Namespace
    replica: Replica
    load: Load

    def __post_init__(self) -> None:
        self._sensors = open_sensors("0")

    def memory_gib(self) -> float | None:
        """Of the whole card; the host's where there is none."""
        reading = self._sensors.read()
        used = reading and (reading.gpu_memory_bytes or reading.host_memory_bytes)
        return None if used is None else used / 2**30

    def tell(self, figure: str, **values: Any) -> None:
        tell(self.given.out / "figures.jsonl", {"bench": f"truce: {figure}"} | rounded(values))

    def trainer(self, name: str, steps: int = STEPS) -> Trainer:
        folder = self.given.out / name
        shapes.write_rows(folder, [self.given.length] * (ROWS * STEPS), prompt_share=0.005)
        spec = TrainSpec.model_validate(
            {
                "base_dir": self.given.train, "base_name": "base", "base_digest": base_digest(self.given.train),
                "data_dir": folder, "out_dir": folder / "out", "quantisation": self.given.quantisation,
                "lora": {"rank": 16, "alpha": 16}, "lengths": {"max_length": self.given.length},
                "schedule": {"learning_rate": 2e-4, "epochs": 1000, "max_steps": steps, "batch_size": ROWS,
                             "save_steps": 4},
            }
        )  # fmt: skip
        return Trainer(spec, self.given.backend, folder)


async def asleep(card: Card) -> None:
    """Sleep gives the memory back, and the adapter that was loaded answers the same afterwards."""
    names = (card.load.model, "base")
    messages = [{"role": "user", "content": PROMPT}]
    before = [(await card.replica.ask(name, messages, max_tokens=32)).text for name in names]
    awake, since = card.memory_gib(), time.monotonic()
    await card.replica.sleep()
    slept, memory = time.monotonic() - since, card.memory_gib()
    since = time.monotonic()
    await card.replica.wake_up()
    woke = time.monotonic() - since
    after = [(await card.replica.ask(name, messages, max_tokens=32)).text for name in names]
    card.tell(
        "vLLM's sleep",
        sleep_s=slept,
        wake_s=woke,
        memory_gib=awake,
        asleep_gib=memory,
        adapter_answers_the_same=before[0] == after[0],
        base_answers_the_same=before[1] == after[1],
        adapter_differs_from_base=before[0] != before[1],
    )


async def uninterrupted(card: Card) -> Trainer:
    trainer = card.trainer("uninterrupted")
    trainer.start()
    await trainer.step(3)
    card.tell("beside a training", **await card.load.during(6), memory_gib=card.memory_gib())
    await trainer.ended()
    return trainer


async def interrupted(card: Card, whole: Trainer) -> None:
    trainer = card.trainer("interrupted")
    trainer.start()
    await trainer.step(5)
    trainer.running.pause()
    await asyncio.sleep(1)
    at = len(trainer.losses)
    waiting = await card.load.during(6)
    card.tell("the trainer waits", **waiting, memory_gib=card.memory_gib(), steps_meanwhile=len(trainer.losses) - at)
    since = time.monotonic()
    trainer.running.go_on()
    await trainer.step(at + 1)
    card.tell("it goes on", next_step_s=time.monotonic() - since)
    await trainer.step(10)
    trainer.running.park()
    seconds = await trainer.ended(ChildFailed)
    await asyncio.sleep(1)
    parked = max(trainer.losses)
    card.tell("it gives the memory back", seconds=seconds, **await card.load.during(4), memory_gib=card.memory_gib())
    trainer.start()
    await trainer.step(parked + 1)
    card.tell("it is started again", first_step_s=trainer.elapsed_s, at_step=parked + 1)
    await trainer.step(18)
    os.killpg(trainer.running.group, signal.SIGKILL)
    await trainer.ended(ChildCrashed)
    killed = max(trainer.losses)
    trainer.start()
    await trainer.ended()
    apart = [abs(trainer.losses[step] - loss) / loss for step, loss in whole.losses.items()]
    card.tell(
        "losses, interrupted against uninterrupted",
        parked_at=parked,
        killed_at=killed,
        steps=len(apart),
        furthest_share=max(apart),
        mean_share=statistics.mean(apart),
    )


async def kept(card: Card) -> None:
    """The truce itself, under an objective that the load breaks: it must wait, and go on when the load has gone."""
    trainer, words = card.trainer("kept", steps=1000), []
    settings = TruceSettings(latency_seconds=card.given.objective, poll_seconds=1, quiet_seconds=5)
    truce = Truce(settings, (card.replica,), lambda: datetime.now(UTC))
    since = time.monotonic()

    async def says(broken: str | None) -> None:
        words.append({"at_s": round(time.monotonic() - since, 1), "broken": broken, "step": len(trainer.losses)})
        (trainer.running.go_on if broken is None else trainer.running.pause)()

    trainer.start()
    await trainer.step(2)
    before, since = len(card.load.took), time.monotonic()
    async with truce.kept(says):
        async with card.load.going():
            await asyncio.sleep(20)
        gone = time.monotonic() - since
        await asyncio.sleep(20)
    card.tell(
        "kept",
        objective_s=card.given.objective,
        load_gone_at_s=gone,
        words=words,
        steps=len(trainer.losses),
        **card.load.since(before),
        failed=card.load.failed,
    )
    trainer.running.go_on()
    assert trainer.task is not None
    trainer.task.cancel()
    await asyncio.gather(trainer.task, return_exceptions=True)


def random_adapter(base: Path, folder: Path) -> Path:
    """An adapter that answers otherwise than its base; on the processor, whatever the machine has."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16, local_files_only=True)
    settings = LoraConfig(r=16, lora_alpha=16, target_modules=list(LINEAR_LAYERS), init_lora_weights=False)
    get_peft_model(model, settings).save_pretrained(str(folder))
    return folder


async def run(given: argparse.Namespace) -> None:
    adapter = random_adapter(given.serve, given.out / "adapter")
    cuda = given.device == "cuda"
    engine = EngineSettings(
        managed=True, device=given.device, sleep_mode=cuda, extra_args=tuple(given.engine_args.split())
    )
    project = ProjectSettings(name="truce", base_dir=given.serve, base_name="base")
    async with own_engine(engine, project, given.out / "engine.log") as replica:
        await replica.load("truce@v2", adapter)
        card = Card(given, replica, Load(replica, "truce@v2"))
        if "sleep" in given.parts and cuda:
            await asleep(card)
        if "interrupted" in given.parts:
            async with card.load.going():
                await card.load.warm.wait()
                card.tell("vLLM alone", **await card.load.during(6), memory_gib=card.memory_gib())
                await interrupted(card, await uninterrupted(card))
        if "kept" in given.parts:
            await kept(card)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--serve", type=Path, required=True, help="folder of the base that vLLM serves")
    parser.add_argument("--train", type=Path, required=True, help="folder of the base that is trained")
    parser.add_argument("--backend", default="unsloth")
    parser.add_argument("--quantisation", default="nf4")
    parser.add_argument("--length", type=int, default=LENGTH, help="tokens of a row")
    parser.add_argument("--objective", type=float, default=0.02, help="seconds to the first token, p95, in `kept`")
    parser.add_argument("--parts", nargs="+", default=PARTS, choices=PARTS)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="that vLLM runs on")
    parser.add_argument("--engine-args", default="--gpu-memory-utilization 0.3 --enforce-eager", help="more for vLLM")
    parser.add_argument("--minutes", type=float, default=9, help="of everything together")
    parser.add_argument("--out", type=Path, default=Path("gpu-bench-results/truce"))
    given = parser.parse_args()
    given.out = given.out.absolute()
    given.out.mkdir(parents=True, exist_ok=True)

    async def limited() -> None:
        async with asyncio.timeout(60 * given.minutes):
            await run(given)

    try:
        asyncio.run(limited())
    except NightschoolError as error:
        sys.stderr.write(f"{error}. {error.hint}\n")
    except TimeoutError:
        sys.stderr.write(
            f"{given.minutes:g} minutes were not enough (--minutes); {given.out} holds what was measured\n"
        )
    else:
        return 0
    return 1


if __name__ == "__main__":
    sys.exit(main())
