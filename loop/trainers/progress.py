"""The trainer's end of the pipe: progress and error lines on stdout, and nothing else there."""

from __future__ import annotations

import json
import os
import resource
import sys
import time
from typing import TextIO

from labeling.errors import NightschoolError
from loop.trainers.spec import Progress


class Channel:
    """Takes stdout for itself; what libraries print goes to stderr from then on."""

    def __init__(self) -> None:
        self._started = time.monotonic()
        self.phases: dict[str, float] = {}
        self._lines: TextIO = os.fdopen(os.dup(sys.stdout.fileno()), "w", encoding="utf-8")
        os.dup2(sys.stderr.fileno(), sys.stdout.fileno())

    def step(self, progress: Progress) -> None:
        self._write(progress.model_dump_json())

    def error(self, error: NightschoolError) -> None:
        self._write(json.dumps({"error": {"code": error.code, "message": str(error), "hint": error.hint}}))

    def mark(self, phase: str) -> None:
        """Notes when a milestone was first reached: seconds from the trainer's start."""
        self.phases.setdefault(phase, round(self.elapsed_seconds(), 2))

    def elapsed_seconds(self) -> float:
        return time.monotonic() - self._started

    def _write(self, line: str) -> None:
        self._lines.write(line + "\n")
        self._lines.flush()


def resident_bytes() -> int:
    with open("/proc/self/statm", encoding="ascii") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def peak_resident_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
