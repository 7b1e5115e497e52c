"""The demo's memory meter counts this process and its children."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from contextlib import suppress

from service.demo import memory
from service.demo.memory import MemoryMeter

HOG = "held = b'x' * (200 << 20); print(len(held), flush=True); input()"


async def test_a_child_counts_and_the_peak_stays() -> None:
    meter = MemoryMeter()
    watching = asyncio.create_task(meter.watch())
    await asyncio.sleep(0.2)
    alone = meter.peak
    watching.cancel()
    with subprocess.Popen([sys.executable, "-c", HOG], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as child:
        assert child.stdout is not None
        child.stdout.readline()
        watching = asyncio.create_task(meter.watch())
        while meter.peak == alone:
            await asyncio.sleep(0.05)
        child.communicate(b"\n")
    assert meter.peak - alone >= 190 << 20
    watching.cancel()
    with suppress(asyncio.CancelledError):
        await watching
    assert memory._now() < meter.peak
