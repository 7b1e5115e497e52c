"""Caches that grow night after night until a disk is full: how large they are, and which may go.

The trainer's own lie in the data folder (`executors.trainer_caches`); others are those of engines and people.
"""

from __future__ import annotations

import asyncio
import getpass
import os
import tempfile
import time
from pathlib import Path

from loop.preflight.finding import Finding
from loop.preflight.look import Look

SECONDS_TO_WALK = 3.0
WORTH_TELLING = 100_000_000


async def caches(look: Look) -> list[Finding]:
    limit = look.context.project.preflight.caches_gb_at_most * 1e9
    sizes = await asyncio.to_thread(measure, known_caches(look.context.data_dir))
    total = sum(size for size, _ in sizes.values())
    told = ", ".join(
        f"{folder} {'at least ' if cut else ''}{size / 1e9:.1f} GB"
        for folder, (size, cut) in sorted(sizes.items(), key=lambda one: -one[1][0])
        if size >= WORTH_TELLING
    )
    if total <= limit:
        return [Finding(f"caches: {told or 'below 0.1 GB each'}")]
    cure = "Delete those folders while no engine or trainer runs: whatever is in them is made or fetched again."
    return [Finding(f"caches have grown to {total / 1e9:.1f} GB, {limit / 1e9:g} are allowed: {told}", cure)]


def known_caches(data_dir: Path) -> list[Path]:
    home = Path.home()
    return [
        *sorted((data_dir / "cache").glob("*")),
        *(home / ".cache" / name for name in ("huggingface", "vllm", "torch", "flashinfer")),
        home / ".triton",
        home / ".nv" / "ComputeCache",
        Path(tempfile.gettempdir()) / f"torchinductor_{getpass.getuser()}",
        Path.cwd() / "unsloth_compiled_cache",
    ]


def measure(folders: list[Path], seconds: float = SECONDS_TO_WALK) -> dict[Path, tuple[int, bool]]:
    """Bytes by folder, and whether time ran out before all was counted. What is not there is left out."""
    deadline = time.monotonic() + seconds
    return {folder: _size(folder, deadline) for folder in folders if folder.is_dir()}


def _size(folder: Path, deadline: float) -> tuple[int, bool]:
    """Links are not followed: a hub's cache names each file twice."""
    total, waiting = 0, [folder]
    while waiting:
        if time.monotonic() > deadline:
            return total, True
        try:
            with os.scandir(waiting.pop()) as entries:
                for entry in entries:
                    if entry.is_dir(follow_symlinks=False):
                        waiting.append(Path(entry.path))
                    elif entry.is_file(follow_symlinks=False):
                        total += entry.stat(follow_symlinks=False).st_size
        except OSError:  # gone meanwhile, or not ours to read
            continue
    return total, False
