"""Ctrl-C twice: the ending that the first one began is not cut short."""

from __future__ import annotations

import signal
import subprocess
import sys

import pytest

PROGRAM = """
import asyncio
from service.signals import cancel_on_signal

async def body():
    try:
        print("running", flush=True)
        await asyncio.Event().wait()
    finally:
        print("ending", flush=True)
        await asyncio.wait_for(second.wait(), 20)
        print("ended in order", flush=True)

async def main():
    global second
    second = asyncio.Event()
    task = asyncio.create_task(body())
    cancel_on_signal(task, second.set)
    try:
        await task
    except asyncio.CancelledError:
        print("done", flush=True)

asyncio.run(main())
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_second_signal_does_not_cut_the_ending_short(number: signal.Signals) -> None:
    """What closes on the first signal closes to its end, with no traceback."""
    child = subprocess.Popen([sys.executable, "-c", PROGRAM], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert child.stdout is not None
    assert child.stdout.readline() == "running\n"
    child.send_signal(number)
    assert child.stdout.readline() == "ending\n"
    child.send_signal(number)
    out, errors = child.communicate(timeout=30)
    assert (out, errors, child.returncode) == ("ended in order\ndone\n", "", 0)
