"""One, two (or more) cards through the product's own path: tokens a second, memory against the estimate, and whether
the adapter is the same.

    python deploy/gpu-bench/several_cards.py [--cards 2] [--only REGEX] [--minutes 7] [--out DIR] [--python P] [--tiny]

From the repository's root. A JSON line a run, on stdout and in DIR/several_cards.jsonl, and one that compares them.
`--tiny`: ranks on a CPU with small models, to try the bench itself.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import re
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parents[1]))

import shapes  # noqa: E402 - beside this file, and after the repository is on the path
from figures import tell  # noqa: E402

from labeling.errors import NightschoolError  # noqa: E402
from loop.executors import LocalExecutor  # noqa: E402
from loop.machine_memory import this_machine, visible_cards  # noqa: E402
from loop.memory_estimate import CUDA_CONTEXT, NCCL_BUFFERS  # noqa: E402
from loop.methods import Method  # noqa: E402
from loop.run_plan import planned  # noqa: E402
from loop.trainers.spec import TrainSpec, read_result, read_rows, write_spec  # noqa: E402
from loop.training_run import with_smaller_plans  # noqa: E402

GIB = 2**30
STEPS, WARM_STEPS = 6, 2
AT_LEAST_SECONDS = 40  # no run is begun with less left
ADAPTER = "adapter/adapter_model.safetensors"


@dataclass(frozen=True)
class Job:
    """`cards` 0: as many as are asked for. `same_as`: the run whose adapter this one's must be. `batch`: rows a step,
    of which a pair is two, and a thumb with its mismatched partner, too."""

    name: str
    shape: str = "8b"
    cards: int = 0
    sharding: str = "replicate"
    quantisation: str = "nf4"
    backend: str = "peft"
    method: Method = "sft"
    batch: int = 4
    length: int = 4096
    replay: float = 0.0
    mode: str = "auto"
    same_as: str = ""


METHODS: tuple[Method, ...] = ("dpo", "kto")

# In the order of what is wanted most: what does not fit into the minutes is left out.
JOBS = (
    Job("135m-one", "135m", 1, batch=16, length=256, quantisation="none", replay=0.4),
    Job("135m-replicate", "135m", batch=16, length=256, quantisation="none", replay=0.4, same_as="135m-one"),
    Job("135m-fsdp", "135m", 0, "fsdp", batch=16, length=256, quantisation="none", replay=0.4, same_as="135m-one"),
    Job("135m-fsdp-one-card", "135m", 1, "fsdp", batch=16, length=256, quantisation="none", replay=0.4,
        same_as="135m-one"),
    Job("8b-nf4-one", cards=1, mode="on"),
    Job("8b-nf4-replicate", mode="on"),
    Job("8b-nf4-fsdp", sharding="fsdp", mode="on"),
    Job("8b-bf16-one", cards=1, quantisation="none", mode="on"),
    Job("8b-bf16-replicate", quantisation="none", mode="on"),
    Job("8b-bf16-fsdp", sharding="fsdp", quantisation="none", mode="on"),
    Job("8b-nf4-unsloth-one", cards=1, backend="unsloth"),
    Job("8b-nf4-unsloth-replicate", backend="unsloth"),
    Job("135m-nf4-one", "135m", 1, batch=16, length=256),
    Job("135m-nf4-fsdp", "135m", 0, "fsdp", batch=16, length=256, same_as="135m-nf4-one"),
    Job("135m-axolotl-one", "135m", 1, batch=16, length=256, quantisation="none", backend="axolotl"),
    *(
        Job(f"135m-axolotl-{way}{'-one-card' * one_card}", "135m", int(one_card), way, quantisation="none", batch=16,
            length=256, backend="axolotl", same_as="135m-axolotl-one")
        for way, one_card in (("zero3", True), ("replicate", False), ("zero3", False), ("fsdp", False))
    ),
    Job("8b-nf4-axolotl-one", cards=1, mode="on", backend="axolotl"),
    Job("8b-nf4-axolotl-replicate", mode="on", backend="axolotl"),
    Job("8b-bf16-axolotl-one", cards=1, mode="on", backend="axolotl", quantisation="none"),
    Job("8b-bf16-axolotl-zero3", sharding="zero3", mode="on", backend="axolotl", quantisation="none"),
    Job("8b-bf16-axolotl-fsdp", sharding="fsdp", mode="on", backend="axolotl", quantisation="none"),
    Job("8b-nf4-axolotl-zero3", sharding="zero3", mode="on", backend="axolotl"),
    Job("8b-nf4-axolotl-fsdp", sharding="fsdp", mode="on", backend="axolotl"),
    Job("8b-nf4-dpo-one", cards=1, mode="on", method="dpo", batch=8),
    Job("8b-nf4-dpo-replicate", mode="on", method="dpo", batch=8),
    Job("8b-nf4-kto-one", cards=1, mode="on", method="kto", batch=8),
    Job("8b-nf4-kto-replicate", mode="on", method="kto", batch=8),
    *(
        Job(f"135m-{method}-{way}", "135m", way == "one", "replicate" if way == "one" else way, quantisation="none",
            method=method, batch=16, length=256, replay=0.4, same_as="" if way == "one" else f"135m-{method}-one")
        for method in METHODS for way in ("one", "replicate", "fsdp")
    ),
)  # fmt: skip


@dataclass
class Bench:
    out: Path
    models: Path
    cards: int
    tiny: bool
    python: str  # of the trainers; empty: this one
    until: float
    speeds: dict[str, float] = field(default_factory=dict)

    def seconds_left(self) -> float:
        return self.until - time.monotonic()

    def tell(self, name: str, **figures: Any) -> None:
        tell(self.out / "several_cards.jsonl", {"bench": "several-cards", "run": name, **figures})

    def model(self, shape: str) -> Path:
        """Made once, in a process that gives the card's memory back."""
        folder = self.models / shape
        if not (folder / "config.json").exists():
            subprocess.run([sys.executable, str(HERE / "shapes.py"), shape, str(folder)], stdout=sys.stderr, check=True)
        return folder

    def spec(self, job: Job) -> TrainSpec:
        folder = self.out / job.name
        shutil.rmtree(folder, ignore_errors=True)
        length = 48 if self.tiny else job.length
        self._write_data(folder, job, [length - (number % 5) for number in range(2 * job.batch)])
        return TrainSpec.model_validate(
            {
                "base_dir": self.model("tiny" if self.tiny else job.shape), "base_name": "base",
                "base_digest": "sha256:0", "data_dir": folder, "out_dir": folder / "out",
                "method": job.method, "quantisation": job.quantisation, "lora": {"rank": 16, "alpha": 16},
                "lengths": {"max_length": length},
                "schedule": {"max_steps": STEPS, "batch_size": job.batch, "epochs": 100, "min_steps": STEPS,
                             "learning_rate": 2e-4, "replay_share": job.replay},
                "cards": {"gpus": job.cards or self.cards, "sharding": job.sharding},
                "memory": {"checkpointing": job.mode},
            }
        )  # fmt: skip

    @staticmethod
    def _write_data(folder: Path, job: Job, lengths: list[int]) -> None:
        """Beside pairs or thumbs, nothing but replay: labels would be shown first."""
        if job.method == "sft":
            shapes.write_rows(folder, lengths, replay_share=job.replay)
            return
        shapes.write_rows(folder, lengths if job.replay else [], replay_share=1.0)
        shapes.write_preferences(folder, lengths, thumbs=job.method == "kto")

    async def one(self, job: Job) -> None:
        """Whatever goes wrong with one run is told and stops no other."""
        if self.seconds_left() < AT_LEAST_SECONDS:
            self.tell(job.name, left_out="no time left")
            return
        try:
            async with asyncio.timeout(self.seconds_left()):
                await self._one(job)
        except TimeoutError:
            self.tell(job.name, left_out="no time left")
        except (NightschoolError, subprocess.SubprocessError, RuntimeError, OSError, ValueError) as error:
            log = self.out / job.name / "trainer.log"
            tail = log.read_text(errors="replace")[-2500:] if log.exists() else ""
            self.tell(job.name, failed=str(error)[-800:], log=tail)

    async def _one(self, job: Job) -> None:
        backend = "peft" if self.tiny and job.backend == "unsloth" else job.backend
        spec = self.spec(job)
        found = planned(spec, backend, read_rows(spec.data_dir, may_be_none=True), this_machine(spec.cards.gpus))
        spec, started = found.spec, time.monotonic()
        folder = spec.data_dir
        write_spec(spec, folder / "spec.json")
        lines: list[dict[str, Any]] = []
        passed_on = {name: os.environ[name] for name in ("PYTHONPATH", "LD_LIBRARY_PATH") if name in os.environ}
        await with_smaller_plans(
            lambda: LocalExecutor().run(
                f"loop.trainers.{backend}",
                folder / "spec.json",
                on_progress=lines.append,
                log_path=folder / "trainer.log",
                environment=passed_on,
                python=self.python,
            ),
            spec.out_dir,
            lambda plan: lines.clear(),
        )
        self._told(job, spec, lines, time.monotonic() - started)

    def _told(self, job: Job, spec: TrainSpec, lines: list[dict[str, Any]], seconds: float) -> None:
        result = read_result(spec.out_dir)
        assert result is not None
        assert result.memory is not None
        plan, on_card = result.memory.plan, not self.tiny
        speed = median(line["tokens_per_s"] for line in lines[WARM_STEPS:])
        self.speeds[job.name] = speed
        beside = CUDA_CONTEXT + (NCCL_BUFFERS if spec.cards.gpus > 1 else 0) if on_card else 0
        measured = result.memory.measured_bytes - (CUDA_CONTEXT if on_card else 0)
        estimated = plan.estimated_bytes - beside
        of_one = self.speeds.get(re.sub(r"-(replicate|fsdp|zero3)$", "-one", job.name))
        self.tell(
            job.name,
            cards=result.gpus,
            sharding=result.sharding,
            method=job.method,
            tokens_per_s=round(speed),
            times_one_card=round(speed / of_one, 2) if of_one else None,
            peak_gib=round(measured / GIB, 2),
            estimated_gib=round(estimated / GIB, 2),
            ratio=round(estimated / measured, 3),
            checkpointing=plan.checkpointing,
            micro_tokens=plan.micro_tokens,
            attempts=len(result.memory.attempts),
            packed=result.packed,
            losses=[round(line["loss"], 4) for line in lines],
            **(self._compared(job, spec) if job.same_as else {}),
            phases=result.phases,
            device=result.device,
            seconds=round(seconds, 1),
        )

    def _compared(self, job: Job, spec: TrainSpec) -> dict[str, Any]:
        """With the run on one card: relative, over what began as zero. The rest is mostly what was drawn at first."""
        from safetensors.torch import load_file

        other = self.out / job.same_as / "out" / ADAPTER
        if not other.exists():
            return {"compared_with": None}
        mine, theirs = load_file(spec.out_dir / ADAPTER), load_file(other)
        theirs = {name: weight for name, weight in theirs.items() if "lora_B" in name}
        apart = sum(float((mine[name].float() - theirs[name].float()).square().sum()) for name in theirs)
        size = sum(float(weight.float().square().sum()) for weight in theirs.values())
        away = (apart / size) ** 0.5
        return {"compared_with": job.same_as, "adapter_away": round(away, 5)}


async def run(bench: Bench, jobs: list[Job]) -> int:
    for job in jobs:
        await bench.one(job)
    return 0 if bench.speeds else 1


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0] if __doc__ else None)
    parser.add_argument("--cards", type=int, default=0, help="that train together; without it, all that can be seen")
    parser.add_argument("--only", default="", help="runs whose name this regular expression finds")
    parser.add_argument("--minutes", type=float, default=7, help="of all together; what doesn't fit is left out")
    parser.add_argument("--out", type=Path, default=Path("gpu-bench-results/several-cards"))
    parser.add_argument("--models", type=Path, default=Path("/tmp/gpu-bench-models"), help="16 GB for all shapes")  # noqa: S108
    parser.add_argument("--python", default="", help="the trainers' own, as trainer.python: of axolotl or Unsloth")
    parser.add_argument("--tiny", action="store_true", help="on a CPU, to try the bench itself")
    given = parser.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    cards = given.cards or (2 if given.tiny else len(visible_cards()))
    bench = Bench(
        given.out.resolve(), given.models, cards, given.tiny, given.python, time.monotonic() + 60 * given.minutes
    )
    return asyncio.run(run(bench, [job for job in JOBS if re.search(given.only, job.name)]))


if __name__ == "__main__":
    sys.exit(main())
