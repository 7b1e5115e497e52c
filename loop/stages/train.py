"""Starts the trainer as a child process with the spec, watches it, shows it in MLflow, and digests what came out."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import time
from pathlib import Path
from typing import Any

from labeling.errors import Unavailable
from loop.adapter_files import check, read_base_config
from loop.machine_memory import visible_card
from loop.memory_record import MemoryOutcome, in_words
from loop.outputs import Delta, Preflight, Trained
from loop.stage import StageContext
from loop.trainers.spec import TrainSpec, read_result, read_spec, write_spec
from loop.watch.sensors import open_sensors
from loop.watch.supervise import Supervisor, earlier_attempt
from loop.watch.usage import Usage

METRICS_SECONDS = 1.0
LOGGED = (
    *("loss", "grad_norm", "learning_rate", "tokens_per_s", "memory_bytes", "margin", "seconds_left"),
    *("gpu_memory_bytes", "utilisation", "temperature_c", "power_w", "power_cap_w", "clock_mhz"),
    *("host_memory_bytes", "load"),
)


async def run(context: StageContext) -> Trained:
    started = time.monotonic()
    earlier = earlier_attempt(context.folder)
    spec = _own_spec(context, earlier)
    _take_over_checkpoint(context.folder, earlier)
    usage = Usage.read(earlier) if earlier else Usage()
    registry = context.clients.registry
    run_id = await registry.start_run(
        context.project.name, context.night_id, f"{context.project.name} {context.date}", _parameters(context, spec)
    )
    lines: asyncio.Queue[dict[str, Any]] = asyncio.Queue()
    logged: dict[str, Any] = {}

    def show(line: dict[str, Any]) -> None:
        context.progress(line)
        if line.get("elapsed_s") != logged.get("elapsed_s"):  # a step, not the sensors between two
            logged.update(line)
            lines.put_nowait(line)

    logging = asyncio.create_task(_log_metrics(context, run_id, lines), name="training metrics")
    sensors = await asyncio.to_thread(open_sensors, visible_card())
    try:
        await Supervisor(context, spec, run_id, sensors, usage, show).train()
    finally:
        sensors.close()
        lines.put_nowait({})
        await logging
    result = read_result(spec.out_dir)
    assert result is not None, "the executor raises unless the trainer ended well, and that writes the result"
    if result.memory is not None:
        await _log_memory(context, run_id, result.memory)
    if result.extraction is not None:
        with contextlib.suppress(Unavailable):  # the report says it, too
            await registry.tag_run(run_id, {"nightschool.kept_share": f"{result.extraction.kept_share:.4f}"})
    if result.time_limited:
        told = f"{result.steps} of {result.planned_steps} planned steps"
        with contextlib.suppress(Unavailable):  # the report says it, too
            await registry.tag_run(run_id, {"nightschool.time_limited": told})
    files = check(
        spec.out_dir / "adapter",
        read_base_config(context.project.base_dir),
        max_rank=context.engine.max_lora_rank,
        target_modules=context.project.trainer.target_modules,
    )
    _prune(spec.out_dir)
    if earlier is not None:
        _prune(earlier / "out")
    return Trained(
        adapter_dir=str(spec.out_dir / "adapter"),
        adapter_digest=files.digest,
        result=result.model_dump(mode="json"),
        run_id=run_id,
        seconds=time.monotonic() - started,
        watched=usage.told(),
    )


async def _log_metrics(context: StageContext, run_id: str, lines: asyncio.Queue[dict[str, Any]]) -> None:
    """Live in MLflow, until an empty line. A registry that is down costs curves, not the training.

    What came within a moment goes in one request: beside a training on two cores, each request is felt.
    """
    while line := await lines.get():
        await asyncio.sleep(METRICS_SECONDS)
        steps = [line]
        while not lines.empty() and steps[-1]:
            steps.append(lines.get_nowait())
        rows = {int(s["step"]): {key: float(s[key]) for key in LOGGED if s.get(key) is not None} for s in steps if s}
        try:
            await context.clients.registry.log_metrics(run_id, rows)
        except Unavailable as error:
            context.log.warning("metrics_not_logged", steps=sorted(rows), reason=str(error))
        if not steps[-1]:
            return


async def _log_memory(context: StageContext, run_id: str, memory: MemoryOutcome) -> None:
    """Planned and measured. As tags, not parameters: the plan may have changed since the run began."""
    plan = memory.plan
    tags = {
        "checkpointing": plan.checkpointing,
        "micro_tokens": str(plan.micro_tokens),
        "estimated_bytes": str(plan.estimated_bytes),
        "measured_bytes": str(memory.measured_bytes),
        "budget_bytes": str(plan.budget_bytes),
        "plan": in_words(memory),
    }
    try:
        await context.clients.registry.tag_run(run_id, {f"memory.{key}": value for key, value in tags.items()})
    except Unavailable as error:
        context.log.warning("memory_not_logged", reason=str(error))


def _own_spec(context: StageContext, earlier: Path | None) -> TrainSpec:
    """The preflight's spec, writing into this stage's folder; what roll backs left of the rate holds on."""
    spec = read_spec(Path(context.take(Preflight).spec_path))
    limits = spec.limits
    if earlier is not None:
        limits = limits.model_copy(update={"rate_scale": read_spec(earlier / "spec.json").limits.rate_scale})
    spec = spec.model_copy(update={"out_dir": context.folder / "out", "limits": limits})
    write_spec(spec, context.folder / "spec.json")
    return spec


def _take_over_checkpoint(folder: Path, earlier: Path | None) -> None:
    """An earlier, killed attempt's checkpoints become ours by hard link: its folder stays as that worker left it."""
    if earlier is not None and not (folder / "out").exists():
        shutil.copytree(earlier / "out", folder / "out", copy_function=os.link)


def _parameters(context: StageContext, spec: TrainSpec) -> dict[str, str]:
    delta = context.take(Delta)
    recipe = {
        f"{part}.{key}": value for part in ("lora", "schedule", "preference") for key, value in getattr(spec, part)
    }
    start = {"start": spec.start.name, "start_digest": spec.start.digest} if spec.start else {"start": "base"}
    return {
        "backend": context.project.trainer.backend,
        "method": spec.method,
        "method_why": delta.method_why,
        **start,
        "finetuning_type": spec.finetuning_type,
        "quantisation": spec.quantisation,
        "seed": str(spec.seed),
        "base": spec.base_name,
        "base_digest": spec.base_digest,
        "template_digest": spec.template_digest,
        "data_digest": delta.digest,
        "label_rows": str(delta.label_rows),
        "replay_rows": str(delta.replay_rows),
        "base_rows": str(delta.base_rows),
        "pairs": str(delta.pairs),
        "good_thumbs": str(delta.good_thumbs),
        "bad_thumbs": str(delta.bad_thumbs),
        **{key: str(value) for key, value in recipe.items()},
    }


def _prune(out_dir: Path) -> None:
    """Checkpoints carry optimizer state, several times the adapter: gone once the result stands."""
    for folder in out_dir.iterdir():
        if folder.is_dir() and folder.name != "adapter":
            shutil.rmtree(folder)
