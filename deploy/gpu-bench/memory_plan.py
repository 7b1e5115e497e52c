"""Estimated against measured memory, through the product's own path; and a run that falls back by itself.

    python deploy/gpu-bench/memory_plan.py [--only REGEX] [--minutes 5] [--out DIR] [--models DIR] [--tiny]

From the repository's root. One JSON line a run, on stdout and in DIR/memory_plan.jsonl: `ratio` is estimated to
measured, of what the allocator hands out (of resident memory on a CPU). Runs share the card as long as their estimates
fit side by side, so their speeds mean nothing. `--tiny`: on a CPU, with peft and small models, to try the bench itself.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import re
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parents[1]))

import shapes  # noqa: E402 - beside this file, and after the repository is on the path
from figures import tell  # noqa: E402

from labeling.errors import NightschoolError  # noqa: E402
from loop.executors import LocalExecutor  # noqa: E402
from loop.machine_memory import Machine, this_machine  # noqa: E402
from loop.memory_estimate import CUDA_CONTEXT, Workload  # noqa: E402
from loop.memory_plan import Plan, itemised, plan_for, plans_by_speed  # noqa: E402
from loop.run_plan import setup_of, workload  # noqa: E402
from loop.trainers.spec import MemorySpec, TrainSpec, read_result, read_rows, write_spec  # noqa: E402
from loop.training_run import with_smaller_plans  # noqa: E402

GIB = 2**30
CARD_SHARE = 0.9  # of what is free, for all runs at once
ROOM = 1.4  # of its estimate, for a run whose plan is given: what it really takes is to be seen
STEPS = 3
AT_LEAST_SECONDS = 35  # no run is begun with less left
TINY = {"8b": "tiny", "1b": "tiny", "135m": "tiny"}


@dataclass(frozen=True)
class Job:
    """`rows` of `length` tokens at once, in steps of `batch`. `mode` "auto": the product's plan under `budget_gib`."""

    name: str
    shape: str = "8b"
    backend: str = "unsloth"
    quantisation: str = "nf4"
    mode: str = "off"
    rows: int = 2
    batch: int = 2
    length: int = 4096
    budget_gib: float | None = None
    replay: float = 0.0
    finetuning: str = "lora"
    lie: bool = False  # a first plan that can't hold, so that memory runs out


# In the order of what is wanted most: what does not fit into the minutes is left out.
JOBS = (
    Job("1b-out-of-memory-falls-back", "1b", mode="auto", rows=8, batch=8, budget_gib=10, lie=True),
    Job("135m-short", "135m", quantisation="none", rows=64, batch=64, length=128, replay=0.4),
    Job("8b-nf4-off-2x4096", rows=2),
    Job("8b-nf4-offload-2x4096", mode="offload"),
    Job("8b-bf16-offload-2x4096", mode="offload", quantisation="none"),
    Job("8b-nf4-on-2x4096", mode="on"),
    Job("1b-nf4-off-4x4096", "1b", rows=4, batch=4),
    Job("8b-nf4-off-1x4096", rows=1, batch=1),
    Job("8b-auto-in-16-GiB", mode="auto", rows=4, batch=4, budget_gib=16),
    Job("8b-nf4-off-32x256", rows=32, batch=32, length=256, replay=0.4),
    Job("8b-nf4-peft-on-2x4096", backend="peft", mode="on"),
    Job("8b-nf4-peft-offload-2x4096", backend="peft", mode="offload"),
    Job("1b-nf4-peft-off-2x4096", "1b", backend="peft"),
    Job("8b-bf16-off-1x4096", rows=1, batch=1, quantisation="none"),
    Job("8b-nf4-off-2x4096-in-parts", rows=1, batch=2),
    Job("1b-full-off-2x4096", "1b", backend="peft", quantisation="none", finetuning="full"),
    Job("1b-full-on-2x4096", "1b", backend="peft", quantisation="none", finetuning="full", mode="on"),
)


@dataclass
class Bench:
    out: Path
    models: Path
    tiny: bool
    until: float
    machine: Machine
    taken: int = 0
    ratios: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.freed = asyncio.Condition()
        self.making: dict[str, asyncio.Lock] = {}

    def seconds_left(self) -> float:
        return self.until - time.monotonic()

    def tell(self, name: str, **figures: Any) -> None:
        tell(self.out / "memory_plan.jsonl", {"bench": "memory-plan", "run": name, **figures})

    async def model(self, shape: str) -> Path:
        """Made once, in a process that gives the card's memory back."""
        folder = self.models / shape
        async with self.making.setdefault(shape, asyncio.Lock()):
            if not (folder / "config.json").exists():
                command = (sys.executable, str(HERE / "shapes.py"), shape, str(folder))
                child = await asyncio.create_subprocess_exec(*command, stdout=sys.stderr)
                try:
                    if await child.wait() != 0:
                        raise RuntimeError(f"the {shape} model could not be made")
                finally:
                    if child.returncode is None:
                        child.kill()
        return folder

    async def one(self, job: Job) -> None:
        """Waits for room on the card, trains, tells. Whatever goes wrong with one run is told and stops no other."""
        try:
            async with asyncio.timeout(self.seconds_left()):
                await self._one(job)
        except TimeoutError:
            self.tell(job.name, left_out="no time left")
        except (NightschoolError, RuntimeError, OSError, ValueError) as error:
            log = self.out / job.name / "trainer.log"
            tail = log.read_text(errors="replace")[-1500:] if log.exists() else ""
            self.tell(job.name, failed=str(error)[-800:], log=tail)

    async def _one(self, job: Job) -> None:
        spec, work = self._spec(job, await self.model(TINY[job.shape] if self.tiny else job.shape))
        expected = max(plan.estimated_bytes for plan in spec.memory.plans)
        if job.lie:
            expected = int((job.budget_gib or 0) * GIB)
        room = int(CARD_SHARE * self.machine.free)
        async with self.freed:
            await self.freed.wait_for(lambda: self.taken == 0 or self.taken + expected <= room)
            self.taken += expected
        try:
            if self.seconds_left() < AT_LEAST_SECONDS:
                raise TimeoutError
            await self._train(job, spec, work)
        finally:
            async with self.freed:
                self.taken -= expected
                self.freed.notify_all()

    def _spec(self, job: Job, base: Path) -> tuple[TrainSpec, Workload]:
        folder = self.out / job.name
        length = job.length if not self.tiny else 1024 if job.lie else 48
        shapes.write_rows(folder, [length] * (2 * job.batch), replay_share=job.replay)
        spec = TrainSpec.model_validate(
            {
                "base_dir": base, "base_name": "base", "base_digest": "sha256:0",
                "data_dir": folder, "out_dir": folder / "out", "quantisation": job.quantisation,
                "finetuning_type": job.finetuning,
                "lora": {"rank": 16, "alpha": 16}, "lengths": {"max_length": length},
                "schedule": {"max_steps": STEPS, "batch_size": job.batch, "epochs": 100, "min_steps": STEPS,
                             "learning_rate": 1e-4, "replay_share": job.replay},
            }
        )  # fmt: skip
        work = workload(spec, read_rows(folder))
        return spec.model_copy(update={"memory": self._memory(job, spec, work)}), work

    def _memory(self, job: Job, spec: TrainSpec, work: Workload) -> MemorySpec:
        setup = setup_of(spec, self._backend(job), self.machine, work.length)
        if job.mode == "auto":
            budget = self.machine.budget(job.budget_gib if not self.tiny else 0.75, 1.0)
            plans = tuple(self._ladder(setup, work, budget, job.lie))
            return MemorySpec(budget_gib=budget / GIB, plans=plans)
        given: Any = job.mode
        plan = plan_for(setup, work, given, job.rows * work.length, 0)
        budget = int(ROOM * plan.estimated_bytes) + GIB
        return MemorySpec(
            budget_gib=budget / GIB,
            checkpointing=given,
            micro_tokens=plan.micro_tokens,
            plans=(plan.model_copy(update={"budget_bytes": budget}),),
        )

    def _ladder(self, setup: Any, work: Workload, budget: int, lie: bool) -> list[Plan]:
        """`lie`: first everything at once without checkpointing, as if it took nothing."""
        plans = plans_by_speed(setup, work, budget)
        honest = [plan for plan in plans if plan.fits] or [min(plans, key=lambda plan: plan.estimated_bytes)]
        if not lie:
            return honest[:1] + [plan for plan in honest[1:] if plan.estimated_bytes < 0.8 * honest[0].estimated_bytes]
        whole = plan_for(setup, work, "off", work.tokens, budget)
        return [whole.model_copy(update={"estimated_bytes": 0}), *honest[:3]]

    def _backend(self, job: Job) -> str:
        return "peft" if self.tiny else job.backend

    async def _train(self, job: Job, spec: TrainSpec, work: Workload) -> None:
        folder = self.out / job.name
        write_spec(spec, folder / "spec.json")
        started = time.monotonic()
        fell_back: list[str] = []
        passed_on = {name: os.environ[name] for name in ("PYTHONPATH", "HF_HUB_OFFLINE") if name in os.environ}
        await with_smaller_plans(
            lambda: LocalExecutor().run(
                f"loop.trainers.{self._backend(job)}",
                folder / "spec.json",
                on_progress=lambda line: None,
                log_path=folder / "trainer.log",
                environment=passed_on,
            ),
            spec.out_dir,
            lambda plan: fell_back.append(f"{plan.checkpointing} {plan.micro_tokens}"),
        )
        result = read_result(spec.out_dir)
        assert result is not None
        assert result.memory is not None
        outcome = result.memory
        items = itemised(setup_of(spec, self._backend(job), self.machine, work.length), work, outcome.plan)
        on_card = self.machine.device == "cuda"
        estimated = items.allocated if on_card else items.total
        measured = outcome.measured_bytes - (CUDA_CONTEXT if on_card else 0)
        self.ratios.append(estimated / measured)
        self.tell(
            job.name,
            checkpointing=outcome.plan.checkpointing,
            micro_tokens=outcome.plan.micro_tokens,
            micro_batches=outcome.plan.micro_batches,
            estimated_gib=round(estimated / GIB, 2),
            measured_gib=round(measured / GIB, 2),
            ratio=round(estimated / measured, 3),
            budget_gib=round(outcome.plan.budget_bytes / GIB, 2),
            items={key: round(value / GIB, 3) for key, value in vars(items).items() if isinstance(value, int)},
            moment=items.moment,
            fell_back=fell_back,
            attempts=[f"{a.outcome}: {a.plan.checkpointing} {a.plan.micro_tokens}" for a in outcome.attempts],
            note=outcome.note,
            packed=result.packed,
            not_packed=result.not_packed,
            final_loss=round(result.final_loss, 4),
            device=result.device,
            seconds=round(time.monotonic() - started, 1),
        )


async def run(bench: Bench, jobs: list[Job]) -> int:
    """Smaller models first on the card while the large one is made; at most so many processes as there are cores."""
    at_once = asyncio.Semaphore(1 if bench.tiny else 4)

    async def queued(job: Job) -> None:
        async with at_once:
            await bench.one(job)

    await asyncio.gather(*(queued(job) for job in jobs))
    if bench.ratios:
        bench.tell(
            "all", runs=len(bench.ratios), lowest=round(min(bench.ratios), 3), highest=round(max(bench.ratios), 3)
        )
    return 0 if bench.ratios else 1


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--only", default="", help="runs whose name this regular expression finds")
    parser.add_argument("--minutes", type=float, default=5, help="of all together; what doesn't fit is left out")
    parser.add_argument("--out", type=Path, default=Path("gpu-bench-results/memory-plan"))
    parser.add_argument("--models", type=Path, default=Path("/tmp/gpu-bench-models"), help="20 GB for all shapes")  # noqa: S108
    parser.add_argument("--tiny", action="store_true", help="on a CPU, to try the bench itself")
    given = parser.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    until = time.monotonic() + 60 * given.minutes
    bench = Bench(given.out.resolve(), given.models, given.tiny, until, this_machine())
    return asyncio.run(run(bench, [job for job in JOBS if re.search(given.only, job.name)]))


if __name__ == "__main__":
    sys.exit(main())
