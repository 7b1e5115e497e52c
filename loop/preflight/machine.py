"""This machine: room on the disk for the worst case, how fast it writes, and memory for loading the base."""

from __future__ import annotations

import asyncio
import os
import secrets
import shutil
import time
from pathlib import Path

from loop.adapter_files import read_base_config
from loop.base_weights import read_weights
from loop.machine_memory import available_memory, visible_cards
from loop.plain_lora import BLOCK_OF, parameters, weights
from loop.preflight.finding import Finding, PreflightFailed
from loop.preflight.look import Look
from loop.trainers.spec import ROWS_FILE, TrainSpec

SPARE_BYTES = 500_000_000  # logs, evaluation samples, the engines' and the registry's own growth
CHECKPOINTS = 3  # two are kept, and the third is whole before the oldest goes
CHECKPOINT_BYTES = 12  # a trained number: itself and Adam's two moments, in float32
ADAPTERS = 4  # the trainer's, the installed one, the archive's, the registry's
ADAPTER_BYTES = 2  # a trained number in bfloat16
DATA_COPIES = 3  # the delta, the archive's, the trainer's tokens
TOKENIZER_BYTES = 20_000_000  # lies beside each checkpoint

BLOCK_BYTES, BLOCKS = 4 << 20, 8
SECONDS_TO_MEASURE = 2.0
LOAD_ROOM = 1.2  # beside the weights themselves
PROCESS_BYTES = 2_000_000_000  # torch, its libraries, a batch


async def disk_room(look: Look) -> list[Finding]:
    folder = look.context.data_dir
    needed, free = worst_case_bytes(look.spec), shutil.disk_usage(folder).free
    if free < needed:
        raise PreflightFailed(
            f"{free / 1e9:.1f} GB free under {folder}; a night may need {needed / 1e9:.1f} GB",
            hint="Free disk space or move data_dir, then `nightschool night run --resume`.",
        )
    return [Finding(f"{free / 1e9:.0f} GB free, {needed / 1e9:.1f} GB needed at worst")]


def worst_case_bytes(spec: TrainSpec) -> int:
    """Checkpoints with optimizer state, copies of adapter and data, at their real sizes, and some to spare."""
    modules = [module for module in spec.lora.target_modules if module in BLOCK_OF]  # others are refused elsewhere
    base = read_base_config(spec.base_dir)
    adapter = parameters(base, modules, spec.lora.rank)
    trained = weights(base, modules) if spec.finetuning_type == "full" else adapter
    rows = spec.data_dir / ROWS_FILE
    data = rows.stat().st_size if rows.exists() else 0
    return (
        CHECKPOINTS * (CHECKPOINT_BYTES * trained + TOKENIZER_BYTES)
        + ADAPTERS * ADAPTER_BYTES * adapter
        + DATA_COPIES * data
        + SPARE_BYTES
    )


async def disk_speed(look: Look) -> list[Finding]:
    """What a checkpoint feels: written and synced. At most a few seconds and 32 MiB."""
    folder, wanted = look.context.data_dir, look.context.project.preflight.disk_mb_per_s_at_least
    try:
        speed = await asyncio.to_thread(write_speed, folder)
    except OSError as error:
        raise PreflightFailed(
            f"cannot write in {folder}: {error.strerror}",
            hint="Free disk space, or give data_dir a place that can be written.",
        ) from error
    told = f"{folder} takes {speed / 1e6:.0f} MB/s, written and synced"
    if speed / 1e6 >= wanted:
        return [Finding(told)]
    cure = "Move data_dir to a local disk; checkpoints stop the training while they are written."
    return [Finding(f"{told}; preflight.disk_mb_per_s_at_least is {wanted:g}", cure)]


def write_speed(folder: Path) -> float:
    """Bytes a second. Every block is synced, so that a slow disk is left after the first blocks."""
    path = folder / f".speed.{secrets.token_hex(4)}"
    block = os.urandom(BLOCK_BYTES)  # a disk that compresses must not look fast
    started = time.monotonic()
    written = 0
    try:
        with path.open("wb", buffering=0) as file:
            for _ in range(BLOCKS):
                written += file.write(block)
                os.fsync(file.fileno())
                if time.monotonic() - started > SECONDS_TO_MEASURE:
                    break
    finally:
        path.unlink(missing_ok=True)
    return written / (time.monotonic() - started)


async def cards(look: Look) -> list[Finding]:
    """As many as are to train together; where the night trains on one, there is nothing to say."""
    wanted = look.spec.cards
    if not wanted.launched:
        return []
    there = await asyncio.to_thread(visible_cards)
    if wanted.gpus > max(1, len(there)):
        seen = f"{len(there)} can be seen here" if there else "none can be seen here"
        hidden = os.environ.get("CUDA_VISIBLE_DEVICES")
        raise PreflightFailed(
            f"trainer.gpus = {wanted.gpus}, and {seen}"
            f"{f' (CUDA_VISIBLE_DEVICES is {hidden!r})' if hidden is not None else ''}",
            hint="Lower trainer.gpus, or let CUDA_VISIBLE_DEVICES name as many cards (`nvidia-smi` lists them).",
        )
    plural = "cards train together" if wanted.gpus > 1 else "card trains"
    return [Finding(f"{wanted.gpus} {plural}, sharding {wanted.sharding}")]


async def memory(look: Look) -> list[Finding]:
    """Enough to load the base at all; what training takes on top is the memory plan's business."""
    there, limited_by = available_memory()
    largest = max(path.stat().st_size for path in read_weights(look.spec.base_dir).files)
    needed = int(LOAD_ROOM * largest) + PROCESS_BYTES
    told = f"{there / 1e9:.1f} GB of memory free ({limited_by}), {needed / 1e9:.1f} GB needed to load the base"
    if there < needed:
        raise PreflightFailed(
            told, hint="End what holds it (`ps aux --sort=-rss`), or raise the container's memory limit."
        )
    return [Finding(told)]
