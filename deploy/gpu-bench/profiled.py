"""The trainer's own process with three of its steps under torch's profiler: profile.txt beside the spec.

python profiled.py SPEC     (BACKEND=peft|unsloth)
"""

from __future__ import annotations

import os
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

FIRST, LAST = 5, 8


def watch(folder: Path) -> None:
    import torch
    from torch.profiler import ProfilerActivity, profile

    from loop.trainers.sft_loop import RetentionTrainer

    step = RetentionTrainer.training_step
    kinds = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if torch.cuda.is_available() else [])
    profiler = profile(activities=kinds)

    def watched(self: Any, *given: Any, **named: Any) -> Any:
        now = self.state.global_step
        if now == FIRST:
            profiler.start()
        if now == LAST:
            profiler.stop()
            means = profiler.key_averages()
            order = "self_device_time_total" if torch.cuda.is_available() else "self_cpu_time_total"
            table = means.table(sort_by=order, row_limit=45, max_name_column_width=70)
            cpu = means.table(sort_by="self_cpu_time_total", row_limit=25, max_name_column_width=70)
            (folder / "profile.txt").write_text(f"{LAST - FIRST} steps\n{table}\n{cpu}")
        return step(self, *given, **named)

    RetentionTrainer.training_step = watched  # type: ignore[method-assign]


if __name__ == "__main__":
    backend = import_module(f"loop.trainers.{os.environ.get('BACKEND', 'unsloth')}")
    load = backend.load

    def load_and_watch(spec: Any, longest: int) -> Any:
        watch(spec.out_dir)  # after start(): Unsloth goes first
        return load(spec, longest)

    from loop.trainers.child import Backend, main

    sys.exit(main(Backend(backend.start, load_and_watch)))
