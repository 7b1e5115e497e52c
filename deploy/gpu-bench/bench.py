"""Training on a GPU, measured through the product's own path; each figure beside its bar. See docs/packing.md.

    python deploy/gpu-bench/bench.py [--only check,qlora,…] [--minutes 9] [--out DIR] [--tiny]

One JSON line a figure on stdout and in DIR/figures.jsonl. `--tiny` runs all of it on a CPU, with peft and a model of
two small layers: the figures then mean nothing. Only `night`, which needs a real model, is left out of it.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parents[1]))

import product  # noqa: E402 - beside this file, and after the repository is on the path
import shapes  # noqa: E402
from figures import rounded, tell  # noqa: E402

LORA = {"rank": 16, "alpha": 16}


@dataclass
class Bench:
    out: Path
    models: Path
    tiny: bool
    until: float

    def __post_init__(self) -> None:
        self.backend = "peft" if self.tiny else "unsloth"
        self.figures: dict[str, float] = {}

    def model(self, shape: str) -> Path:
        shape = "tiny" if self.tiny else shape
        folder = self.models / shape
        if not (folder / "config.json").exists():  # its own process: it gives the GPU's memory back
            subprocess.run([sys.executable, str(HERE / "shapes.py"), shape, str(folder)], check=True, stdout=sys.stderr)
        return folder

    def train(self, name: str, shape: str, lengths: list[int], steps: int, batch: int, **given: Any) -> product.Run:
        """`given`: of the spec; and replay_share, prompt_share of the rows."""
        folder = self.out / name
        shares = {key: given.pop(key) for key in ("replay_share", "prompt_share") if key in given}
        shapes.write_rows(folder, lengths, **shares)
        schedule = {"learning_rate": 2e-4, "epochs": 1000, "max_steps": steps, "batch_size": batch, "kl_weight": 1.35}
        lengths_spec = {"max_length": max(lengths), "packing": given.pop("packing", "auto")}
        spec: dict[str, Any] = {
            "lora": LORA, "schedule": schedule | given.pop("schedule", {}), "lengths": lengths_spec,
            "quantisation": given.pop("quantisation", "none" if self.tiny else "nf4"),
        }  # fmt: skip
        run = product.train(folder, self.model(shape), self.backend, self.seconds_left(), **spec, **given)
        self.tell(name, tokens_per_s=run.tokens_per_s, samples_per_s=run.samples_per_s, step_s=run.step_s,
                  first_step_s=run.first_step_s, loss=run.loss, **run.result)  # fmt: skip
        return run

    def rival(self, name: str, loop: str, shape: str, batches: list[list[int]], **asked: Any) -> dict[str, Any]:
        asked = {
            "quantised": not self.tiny,
            "checkpointing": False,
            "optimizer": "adamw",
            "batches": batches,
        } | asked
        loop = "hf" if self.tiny else loop
        command = [sys.executable, str(HERE / "rivals.py"), loop, str(self.model(shape)), json.dumps(asked)]
        with (self.out / f"{name}.log").open("w") as log:
            child = subprocess.run(
                command, stdout=subprocess.PIPE, stderr=log, timeout=self.seconds_left(), check=False, text=True
            )
        if child.returncode:
            raise RuntimeError((self.out / f"{name}.log").read_text()[-1500:])
        found: dict[str, Any] = json.loads(child.stdout.splitlines()[-1])
        self.tell(name, **found)
        return found

    def seconds_left(self) -> float:
        return max(self.until - time.monotonic(), 1)

    def compare(self, name: str, value: float, bar: float, *, at_most: bool = False) -> None:
        self.tell(name, value=round(value, 3), bar=bar, reached=value <= bar if at_most else value >= bar)

    def tell(self, bench: str, **figures: Any) -> None:
        tell(self.out / "figures.jsonl", {"bench": bench} | rounded(figures))


Part = Iterator[Callable[[], None]]  # each is one or two runs; when time is up, the rest is left out


def check(b: Bench) -> Part:
    """The kernel behind packed rows against one row at a time, gradients too: it is never measured if it is wrong."""

    def kernel() -> None:
        child = subprocess.run(
            [sys.executable, str(HERE / "kernel_check.py")], stdout=subprocess.PIPE, check=True, text=True
        )
        found: dict[str, Any] = json.loads(child.stdout.splitlines()[-1])
        b.tell("kernel: furthest from one row at a time", **found)

    yield kernel


def qlora(b: Bench) -> Part:
    """8B shape, rank 16 on all linear layers, rows of 4,096 tokens; the same optimizer for all.

    The product as a night runs it, with the recipe's eight rows a step, of which it trains as many at once as its own
    memory plan says; then two rows a step, beside loops that take the same two, or what suits them best.
    """
    length, steps = (64, 6) if b.tiny else (4096, 10)
    kept: dict[str, float] = {}
    whole = {"prompt_share": 0.005, "packing": "auto"}

    def ours() -> None:
        run = b.train("qlora-nf4", "8b", [length] * (steps * 8), steps, 8, **whole)
        kept["planned"] = run.tokens_per_s
        b.compare("product NF4, tokens/s", run.tokens_per_s, 15_000)

    def two_rows() -> None:
        run = b.train("qlora-nf4-2-rows", "8b", [length] * (steps * 2), steps, 2, **whole)
        kept["nf4"] = run.tokens_per_s
        b.compare("first step with warm caches, s", run.first_step_s, 30, at_most=True)

    def bare() -> None:
        kept["bare"] = b.rival("bare-unsloth", "unsloth", "8b", [[length] * 2] * steps)["tokens_per_s"]
        b.compare("product / bare Unsloth loop", kept["nf4"] / kept["bare"], 0.95)

    def hf_checkpointing() -> None:
        two, four = (
            b.rival(f"hf-checkpointing-{rows}-rows", "hf", "8b", [[length] * rows] * 7, checkpointing=True)
            for rows in (2, 4)
        )
        best = max(two["tokens_per_s"], four["tokens_per_s"])
        b.compare(
            "product / transformers + peft with checkpointing, two rows each", kept["nf4"] / two["tokens_per_s"], 2.0
        )
        b.compare(
            "product as planned / transformers + peft with checkpointing", kept["planned"] / two["tokens_per_s"], 2.0
        )
        b.tell("product / transformers + peft at its best with checkpointing", value=kept["planned"] / best)

    def bf16() -> None:
        run = b.train("qlora-bf16", "8b", [length] * (steps * 2), steps, 2, **whole, quantisation="none")
        b.compare("NF4 / bf16", kept["nf4"] / run.tokens_per_s, 0.9)

    def hf_best() -> None:
        found = b.rival("hf-best", "hf", "8b", [[length]] * 7)
        b.compare("product / transformers + peft at its best", kept["planned"] / found["tokens_per_s"], 1.5)

    yield from (ours, two_rows, hf_checkpointing, bare, bf16, hf_best)


def checkpointing(b: Bench) -> Part:
    """What recomputing costs and saves: the same rows with it, and twice as many without."""
    length, steps = (64, 6) if b.tiny else (4096, 10)
    whole = {"prompt_share": 0.005}

    def on() -> None:
        b.train("checkpointing-on", "8b", [length] * 20, steps, 2, **whole, memory={"checkpointing": "on"})

    def offload() -> None:
        b.train("checkpointing-offload", "8b", [length] * 20, steps, 2, **whole, memory={"checkpointing": "offload"})

    def more() -> None:
        b.train("four-rows", "8b", [length] * 40, steps, 4, **whole, memory={"checkpointing": "off"})

    yield from (on, offload, more)


def chats(b: Bench) -> Part:
    """Short chats: packed, padded as they come, padded in buckets; the same rows in every step."""
    batch, steps = (4, 6) if b.tiny else (32, 14)
    lengths = shapes.chat_lengths(batch * steps)
    kept: dict[str, product.Run] = {}

    def packed() -> None:
        kept["packed"] = b.train("chats-packed", "8b", lengths, steps, batch, packing="on")

    def plain() -> None:
        batches = [lengths[first : first + batch] for first in range(0, len(lengths), batch)]
        found = b.rival("chats-plain", "unsloth", "8b", batches)
        b.compare("chats: packed / plainly padded", kept["packed"].tokens_per_s / found["tokens_per_s"], 2.0)

    def bucketed() -> None:
        kept["padded"] = b.train("chats-bucketed", "8b", lengths, steps, batch, packing="off")
        b.compare("chats: packed / padded in buckets", kept["packed"].tokens_per_s / kept["padded"].tokens_per_s, 1.0)
        worst = max(abs(x - y) / y for x, y in zip(kept["packed"].losses, kept["padded"].losses, strict=True))
        b.tell("chats: furthest loss of a step, packed against padded", share=worst, bar=0.02, reached=worst < 0.02)

    def few() -> None:
        b.train("chats-packed-8-rows", "8b", lengths, steps, 8, packing="on")

    def replay() -> None:
        kept["kl"] = b.train(
            "chats-packed-40-percent-replay", "8b", lengths, steps, batch, packing="on", replay_share=0.4
        )

    yield from (packed, plain, bucketed, replay, few)


def small(b: Bench) -> Part:
    """The 135M shape: 60 tokens a row."""
    for batch in (8, 16) if b.tiny else (16, 64, 256):

        def one(batch: int = batch) -> None:
            run = b.train(
                f"small-{batch}", "135m", [60] * max(4 * batch, 64), 8 if b.tiny else 20, batch, quantisation="none"
            )
            if batch >= 64:
                b.compare(f"135M, rows/s at {batch} a step", run.samples_per_s, 198)

        yield one


def profile(b: Bench) -> Part:
    """Where a step's time goes: profile.txt of the 8B run, and of the small one."""
    length = 64 if b.tiny else 4096

    def large() -> None:
        script = {"script": str(HERE / "profiled.py")}
        b.train("profile-8b", "8b", [length] * 20, 10, 2, prompt_share=0.005, **script)

    def chat() -> None:
        script = {"script": str(HERE / "profiled.py")}
        b.train("profile-chats", "8b", shapes.chat_lengths(320), 10, 8 if b.tiny else 32, **script)

    def tiny() -> None:
        script = {"script": str(HERE / "profiled.py")}
        b.train("profile-135m", "135m", [60] * 256, 10, 8 if b.tiny else 64, quantisation="none", **script)

    yield from (large, chat, tiny)


def night(b: Bench) -> Part:
    """Real facts, a real model, the default recipe, and vLLM, which has an environment of its own."""

    def real() -> None:
        own = HERE.parents[1] / ".venv-gpu" / "bin" / "python"
        if b.tiny or not (own.exists() or find_spec("vllm")):
            why = "a random model knows nothing" if b.tiny else "there is no vLLM here: make setup-gpu"
            b.tell("night", left_out=why)
            return
        engine, folder = str(own) if own.exists() else sys.executable, b.out / "night"
        command = [engine, str(HERE / "real_night.py"), "--trainer-python", sys.executable, "--out", str(folder)]
        command += ["--backends", "unsloth,peft", "--minutes", str(b.seconds_left() / 60)]
        child = subprocess.run(command, capture_output=True, timeout=b.seconds_left() + 60, check=False, text=True)
        for line in child.stdout.splitlines():
            b.tell(**json.loads(line))
        if child.returncode:
            raise RuntimeError(child.stderr[-1500:] or f"a training failed; the logs are in {folder}")

    yield real


PARTS = {
    "check": check,
    "qlora": qlora,
    "checkpointing": checkpointing,
    "chats": chats,
    "small": small,
    "profile": profile,
    "night": night,
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--only", default=",".join(PARTS), help=f"of {', '.join(PARTS)}")
    parser.add_argument("--minutes", type=float, default=30, help="of all parts together; what doesn't fit is left out")
    parser.add_argument("--out", type=Path, default=Path("gpu-bench-results"))
    parser.add_argument("--models", type=Path, default=Path("/tmp/gpu-bench-models"), help="16 GB for the 8B shape")  # noqa: S108
    parser.add_argument("--tiny", action="store_true", help="on a CPU, to try the bench itself")
    given = parser.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    bench = Bench(given.out.resolve(), given.models, given.tiny, time.monotonic() + 60 * given.minutes)
    failed = 0
    for part in given.only.split(","):
        for step in PARTS[part](bench):
            name = f"{part}/{step.__name__}"
            if bench.seconds_left() <= 20:
                bench.tell(name, left_out="no time left")
                continue
            try:
                step()
            except (RuntimeError, subprocess.TimeoutExpired, KeyError, subprocess.CalledProcessError) as error:
                failed += 1
                bench.tell(name, failed=str(error)[-1500:])
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
