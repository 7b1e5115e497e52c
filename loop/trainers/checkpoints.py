"""Which checkpoint of an interrupted run may be resumed: the last complete one of the very same run."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from loop.digests import write_durably

CHECKPOINTS = "checkpoints"
MARKER = "complete"


def mark_complete(checkpoint: Path, run_digest: str) -> None:
    """The marker is written last, when everything else is on disk."""
    for path in checkpoint.iterdir():
        with path.open("rb") as file:
            os.fsync(file.fileno())
    write_durably(checkpoint / MARKER, run_digest.encode())


def last_complete(folder: Path, run_digest: str) -> Path | None:
    """None where there is none, or only of other rows or another recipe."""
    marked = [path.parent for path in folder.glob(f"checkpoint-*/{MARKER}") if path.read_text() == run_digest]
    return max(marked, key=lambda path: int(path.name.removeprefix("checkpoint-")), default=None)


def forget_after(folder: Path, step: int) -> None:
    """Removes checkpoints of later steps: what they hold had gone wrong."""
    for path in folder.glob("checkpoint-*"):
        if int(path.name.removeprefix("checkpoint-")) > step:
            shutil.rmtree(path)
