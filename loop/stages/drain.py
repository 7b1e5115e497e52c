"""Waits until no request in flight names the old adapter; it stays loaded as the way back, older ones go."""

from __future__ import annotations

import asyncio
import time

from labeling.errors import NightschoolError
from loop.outputs import Drained, Switched
from loop.reconcile import reconcile
from loop.stage import StageContext

LOOK_SECONDS = 0.1
AT_MOST_SECONDS = 600.0  # nothing is unloaded under a request: waiting on would help nobody


async def run(context: StageContext) -> Drained:
    started = time.monotonic()
    old = context.project.served_name(context.take(Switched).from_adapter)
    while in_flight := context.clients.aliases.in_flight(old):
        if time.monotonic() - started > AT_MOST_SECONDS:
            context.log.warning("not_drained", adapter=old, requests=in_flight)
            break
        await asyncio.sleep(LOOK_SECONDS)
    try:
        unloaded = await reconcile(context.clients, context.project)
    except NightschoolError as error:  # it serves already: what was not tidied up now, the next reconcile does
        context.log.warning("not_reconciled", code=error.code, reason=str(error))
        unloaded = ()
    return Drained(seconds=time.monotonic() - started, unloaded=unloaded)
