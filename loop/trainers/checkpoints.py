"""Which checkpoint of an interrupted run may be resumed: the last complete one of the very same run."""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path

from loop.digests import write_durably

CHECKPOINTS = "checkpoints"
MARKER = "complete"


def mark_complete(checkpoint: Path, run_digest: str) -> None:
    """The marker is written last, when everything else is on disk. DeepSpeed's parts lie in a folder of their own."""
    for path in checkpoint.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())
    write_durably(checkpoint / MARKER, run_digest.encode())


def last_complete(folder: Path, run_digest: str) -> Path | None:
    """None where there is none, or only of other rows or another recipe."""
    marked = [path.parent for path in folder.glob(f"checkpoint-*/{MARKER}") if path.read_text() == run_digest]
    return max(marked, key=lambda path: int(path.name.removeprefix("checkpoint-")), default=None)


def forget_incomplete(folder: Path) -> None:
    """For a trainer that chooses the newest checkpoint by itself."""
    for path in list(folder.glob("checkpoint-*")):
        if not (path / MARKER).exists():
            shutil.rmtree(path)


def phase_folder(out_dir: Path, steps_before: int, objective: str) -> Path:
    """Of one of several phases: its name says where its steps begin, which its checkpoints count from 0."""
    return out_dir / f"phase-{steps_before}-{objective}"


def forget_after(out_dir: Path, step: int) -> None:
    """Removes a run's checkpoints of later steps, counted over all phases: what they hold had gone wrong.

    A finished phase stays: trouble is looked for in each phase anew, so it began in the one that runs.
    """
    for path in list(out_dir.glob(f"**/{CHECKPOINTS}/checkpoint-*")):
        phase = re.match(r"phase-(\d+)-", path.parent.parent.name)
        before = int(phase[1]) if phase else 0
        if before + int(path.name.removeprefix("checkpoint-")) > step:
            shutil.rmtree(path)
