"""One training run as a night does it: a spec, a trainer process, its progress lines and its result."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from loop.executors import GIVEN, INHERITED, trainer_caches
from loop.trainers.rows import plan_batches, tokenise
from loop.trainers.spec import TrainSpec, read_result, read_rows, write_spec

TOLD = {"packed", "not_packed", "phases", "peak_memory_bytes", "device", "memory"}
WARM = 3  # steps that are not counted: kernels are compiled in them


@dataclass(frozen=True)
class Run:
    """`tokens_per_s` counts the rows' own tokens, never padding, from line to line: what is between steps, too."""

    tokens_per_s: float
    samples_per_s: float
    step_s: float
    first_step_s: float  # from the start of the process
    loss: float
    losses: tuple[float, ...]
    result: dict[str, Any]


def train(folder: Path, base: Path, backend: str, seconds: float, script: str = "", **changed: Any) -> Run:
    """Raises RuntimeError with the end of the trainer's log. `script`: run instead of the backend's module."""
    spec = TrainSpec.model_validate(
        {"base_dir": base, "base_name": "base", "base_digest": "sha256:0", "data_dir": folder, "out_dir": folder}
        | changed
    )
    write_spec(spec, folder / "spec.json")
    started = time.monotonic()
    command = [sys.executable, *([script] if script else ["-m", f"loop.trainers.{backend}"]), str(folder / "spec.json")]
    with (folder / "trainer.log").open("w") as log:
        child = subprocess.run(
            command, stdout=subprocess.PIPE, stderr=log, timeout=seconds, check=False, text=True,
            env=_environment(folder.parent) | {"BACKEND": backend},
        )  # fmt: skip
    lines = [json.loads(line) for line in child.stdout.splitlines() if line.startswith("{")]
    result = read_result(folder)
    if child.returncode or result is None:
        raise RuntimeError(f"{lines[-1:]} {(folder / 'trainer.log').read_text()[-1500:]}")
    steps = [line for line in lines if "step" in line]
    batches = _plan(spec)
    warm = min(WARM, len(steps) - 3)
    # On a GPU a step's line comes while the next one runs, but the last one's at once: between these two is less time.
    taken = [later["elapsed_s"] - sooner["elapsed_s"] for sooner, later in pairwise(steps[:-1])][warm:]
    told = [sum(tokens for tokens in batch) for batch in batches[1:-1]][warm:]
    rows = [len(batch) for batch in batches[1:-1]][warm:]
    wall = time.monotonic() - started
    return Run(
        tokens_per_s=sum(told) / sum(taken),
        samples_per_s=sum(rows) / sum(taken),
        step_s=statistics.median(taken),
        first_step_s=steps[0]["elapsed_s"],
        loss=result.final_loss,
        losses=tuple(line["loss"] for line in steps),
        result=result.model_dump(include=TOLD) | {"wall_s": wall},
    )


def _environment(data_dir: Path) -> dict[str, str]:
    """A night's for its trainer. A PYTHONDONTWRITEBYTECODE of ours, say, would cost each start ten seconds more."""
    inherited = {name: os.environ[name] for name in (*INHERITED, "PYTHONPATH") if name in os.environ}
    return inherited | GIVEN | trainer_caches(data_dir)


def _plan(spec: TrainSpec) -> list[list[int]]:
    """Tokens of every row of every step."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(spec.base_dir, local_files_only=True)
    stop = frozenset({tokenizer.eos_token_id})
    examples = list(tokenise(read_rows(spec.data_dir), tokenizer, stop, spec.lengths.max_length))
    lengths = [len(example.tokens) for example in examples]
    plan = plan_batches(lengths, spec.schedule, spec.seed, [example.replay for example in examples])
    return [[lengths[row] for row in batch] for batch in plan]
