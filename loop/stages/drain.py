"""Waits until no request in flight names the old adapter; it stays loaded as the way back, older ones go."""

from __future__ import annotations

import asyncio
import time

from labeling.errors import Unavailable
from loop.outputs import Drained, Switched
from loop.reconcile import reconcile
from loop.stage import StageContext

LOOK_SECONDS = 0.1
AT_MOST_SECONDS = 600.0  # the longest answer; nothing is unloaded under it, so waiting on would help nobody


class NotDrained(Unavailable):
    code = "not_drained"


async def run(context: StageContext) -> Drained:
    started = time.monotonic()
    old = context.project.served_name(context.take(Switched).from_adapter)
    while context.clients.aliases.in_flight(old):
        if time.monotonic() - started > AT_MOST_SECONDS:
            raise NotDrained(f"requests still name {old} after {AT_MOST_SECONDS:.0f} s", hint="Resume the night.")
        await asyncio.sleep(LOOK_SECONDS)
    unloaded = await reconcile(context.clients, context.project)
    return Drained(seconds=time.monotonic() - started, unloaded=unloaded)
