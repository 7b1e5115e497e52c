"""How much memory the whole demo takes: this process and all that it started, at its highest."""

from __future__ import annotations

import asyncio

import psutil

SECONDS_BETWEEN = 5.0


class MemoryMeter:
    """Proportional set size in bytes: pages that processes share count once. Where there is none, resident size."""

    def __init__(self) -> None:
        self.peak = 0

    async def watch(self) -> None:
        """Looks until cancelled."""
        while True:
            self.peak = max(self.peak, await asyncio.to_thread(_now))
            await asyncio.sleep(SECONDS_BETWEEN)


def _now() -> int:
    me = psutil.Process()
    return sum(_size(process) for process in (me, *me.children(recursive=True)))


def _size(process: psutil.Process) -> int:
    try:
        memory = process.memory_full_info()
    except psutil.Error:  # it has just ended
        return 0
    return int(getattr(memory, "pss", 0) or memory.rss)
