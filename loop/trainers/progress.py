"""The trainer's end of the pipe: progress and error lines on stdout, and nothing else there."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from typing import TextIO

from labeling.errors import NightschoolError
from loop.trainers.spec import Progress


class Parked(NightschoolError):
    code = "parked"
    default_hint = "Start the same spec again: it goes on from the checkpoint that was just written."


class Channel:
    """Takes stdout for itself; what libraries print goes to stderr from then on.

    `parked`: somebody wants the machine back; after the step that runs there is a checkpoint, and the end.
    """

    def __init__(self) -> None:
        self._parked = False
        self._started = time.monotonic()
        self.phases: dict[str, float] = {}
        self._lines: TextIO = os.fdopen(os.dup(sys.stdout.fileno()), "w", encoding="utf-8")
        os.dup2(sys.stderr.fileno(), sys.stdout.fileno())

    @property
    def parked(self) -> bool:
        return self._parked

    def park(self) -> None:
        self._parked = True

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


class Relay(Channel):
    """Another channel, to which progress goes as `change` makes it. It takes no stdout of its own."""

    def __init__(self, channel: Channel, change: Callable[[Progress], Progress]) -> None:
        self._channel, self._change = channel, change

    @property
    def parked(self) -> bool:
        return self._channel.parked

    def park(self) -> None:
        self._channel.park()

    def step(self, progress: Progress) -> None:
        self._channel.step(self._change(progress))

    def error(self, error: NightschoolError) -> None:
        self._channel.error(error)

    def mark(self, phase: str) -> None:
        self._channel.mark(phase)

    def elapsed_seconds(self) -> float:
        return self._channel.elapsed_seconds()


def resident_bytes() -> int:
    with open("/proc/self/statm", encoding="ascii") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def peak_resident_bytes() -> int:
    """Of this program alone: `ru_maxrss` would start from what our parent had when it forked."""
    with open("/proc/self/status", encoding="ascii") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith("VmHWM:"))
