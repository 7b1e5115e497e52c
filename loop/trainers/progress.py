"""The trainer's end of the pipe: progress and error lines on stdout, and nothing else there."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TextIO

from labeling.errors import NightschoolError
from loop.trainers.spec import Progress
from loop.trainers.team import Seat


class Parked(NightschoolError):
    code = "parked"
    default_hint = "Start the same spec again: it goes on from the checkpoint that was just written."


class Channel:
    """Takes stdout for itself; what libraries print goes to stderr from then on.

    `parked`: somebody wants the machine back; after the step that runs there is a checkpoint, and the end.
    """

    seat: Seat | None = None  # of one rank of several

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

    def give_back(self) -> None:
        """Stdout as it was, for processes that are started now."""
        os.dup2(self._lines.fileno(), sys.stdout.fileno())

    def _write(self, line: str) -> None:
        self._lines.write(line + "\n")
        self._lines.flush()


class RankChannel(Channel):
    """Of one rank of several: the first one tells the steps, and what went wrong the launcher tells for all."""

    def __init__(self, seat: Seat) -> None:
        super().__init__()
        self.seat, self._started = seat, seat.started

    def step(self, progress: Progress) -> None:
        if self.seat is not None and self.seat.rank == 0:
            super().step(progress)

    def error(self, error: NightschoolError) -> None:
        assert self.seat is not None
        say(error, self.seat.errors, self.seat.rank)


@dataclass(frozen=True)
class Said:
    """What a rank wrote before it ended; `at` by the clock that all processes share."""

    at: float
    code: str
    message: str
    hint: str | None

    @classmethod
    def read(cls, path: Path) -> Said:
        return cls(**json.loads(path.read_text(encoding="utf-8")))


def say(error: NightschoolError, errors: Path, rank: int) -> None:
    """The first word holds: what comes after it, such as being told to end, follows from it."""
    if (errors / f"{rank}.json").exists():
        return
    told = Said(time.monotonic(), error.code, str(error), error.hint)
    path = errors / f".{rank}.tmp"
    path.write_text(json.dumps(asdict(told)), encoding="utf-8")
    path.rename(errors / f"{rank}.json")


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
