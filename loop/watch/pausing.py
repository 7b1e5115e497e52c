"""Stops and continues the trainer: wholly, for whatever reasons there are, or part of the time."""

from __future__ import annotations

import asyncio
import time

from loop.executors import ChildControl

CYCLE_SECONDS = 2.0  # a slowed trainer works a share of each


class Pausing:
    """Reasons are words; while there is one, the trainer is stopped (SIGSTOP keeps its memory)."""

    def __init__(self, working_share: float, cycle_seconds: float = CYCLE_SECONDS) -> None:
        self._share, self._cycle = working_share, cycle_seconds
        self._control: ChildControl | None = None
        self._stopped = False
        self._since = 0.0
        self._seconds = 0.0
        self.reasons: set[str] = set()
        self.slowed_by: set[str] = set()

    @property
    def paused(self) -> bool:
        return bool(self.reasons)

    @property
    def seconds(self) -> float:
        """Spent stopped so far, the parts of slowed cycles included."""
        return self._seconds + (time.monotonic() - self._since if self._stopped else 0.0)

    def take(self, control: ChildControl) -> None:
        """A new child, which runs."""
        self._control, self._stopped = control, False
        self._apply(stop=self.paused)

    def let_go(self) -> None:
        """The child is to end: a stopped one could not."""
        self._apply(stop=False)
        self._control = None

    def pause(self, reason: str) -> None:
        self.reasons.add(reason)
        self._apply(stop=True)

    def go_on(self, reason: str) -> None:
        self.reasons.discard(reason)
        self._apply(stop=self.paused)

    async def run(self) -> None:
        """Slows, until cancelled."""
        while True:
            if not self.slowed_by or self.paused:
                await asyncio.sleep(self._cycle / 4)
                continue
            self._apply(stop=True)
            await asyncio.sleep(self._cycle * (1 - self._share))
            self._apply(stop=self.paused)
            await asyncio.sleep(self._cycle * self._share)

    def _apply(self, *, stop: bool) -> None:
        if self._control is None or stop == self._stopped:
            return
        if stop:
            self._since = time.monotonic()
            self._control.pause()
        else:
            self._seconds += time.monotonic() - self._since
            self._control.go_on()
        self._stopped = stop
