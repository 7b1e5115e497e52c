"""Starts the trainer as a child process with the spec, shows its progress in MLflow, and digests what came out."""

from __future__ import annotations

import asyncio
import os
import shutil
import time
from pathlib import Path
from typing import Any

from labeling.errors import NightschoolError, Unavailable
from loop.adapter_files import check, read_base_config
from loop.outputs import Delta, Preflight, Trained
from loop.stage import StageContext
from loop.trainers.spec import TrainSpec, read_result, read_spec, write_spec

METRICS_SECONDS = 1.0
LOGGED = ("loss", "grad_norm", "learning_rate", "tokens_per_s", "memory_bytes", "margin")


class TookTooLong(NightschoolError):
    code = "took_too_long"
    default_hint = "Raise trainer.hours_allowed or train less; `night run --resume` goes on from the last checkpoint."


async def run(context: StageContext) -> Trained:
    started = time.monotonic()
    spec = _own_spec(context)
    _take_over_checkpoint(context.folder)
    registry = context.clients.registry
    run_id = await registry.start_run(
        context.project.name, context.night_id, f"{context.project.name} {context.date}", _parameters(context, spec)
    )
    lines: asyncio.Queue[dict[str, Any]] = asyncio.Queue()

    def show(line: dict[str, Any]) -> None:
        context.progress(line)
        lines.put_nowait(line)

    logging = asyncio.create_task(_log_metrics(context, run_id, lines), name="training metrics")
    hours = context.project.trainer.hours_allowed
    try:
        async with asyncio.timeout(hours * 3600):
            await context.clients.executor.run(
                f"loop.trainers.{context.project.trainer.backend}",
                context.folder / "spec.json",
                on_progress=show,
                log_path=context.folder / "trainer.log",
                environment={},
                python=context.project.trainer.python,
            )
    except TimeoutError:
        raise TookTooLong(f"training took longer than trainer.hours_allowed = {hours:g}") from None
    finally:
        lines.put_nowait({})
        await logging
    result = read_result(spec.out_dir)
    assert result is not None, "the executor raises unless the trainer ended well, and that writes the result"
    files = check(
        spec.out_dir / "adapter",
        read_base_config(context.project.base_dir),
        max_rank=context.engine.max_lora_rank,
        target_modules=context.project.trainer.target_modules,
    )
    _prune(spec.out_dir)
    return Trained(
        adapter_dir=str(spec.out_dir / "adapter"),
        adapter_digest=files.digest,
        result=result.model_dump(mode="json"),
        run_id=run_id,
        seconds=time.monotonic() - started,
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


def _own_spec(context: StageContext) -> TrainSpec:
    """The preflight's spec, writing into this stage's folder."""
    spec = read_spec(Path(context.take(Preflight).spec_path))
    spec = spec.model_copy(update={"out_dir": context.folder / "out"})
    write_spec(spec, context.folder / "spec.json")
    return spec


def _take_over_checkpoint(folder: Path) -> None:
    """An earlier, killed attempt's checkpoints become ours by hard link: its folder stays as that worker left it."""
    stage = folder.name.rpartition(".")[0]
    earlier = [p for p in folder.parent.glob(f"{stage}.*") if p.name != folder.name and (p / "out").is_dir()]
    if (folder / "out").exists() or not earlier:
        return
    newest = max(earlier, key=lambda p: int(p.name.rpartition(".")[2]))
    shutil.copytree(newest / "out", folder / "out", copy_function=os.link)


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
        "quantisation": spec.quantisation,
        "seed": str(spec.seed),
        "base": spec.base_name,
        "base_digest": spec.base_digest,
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
