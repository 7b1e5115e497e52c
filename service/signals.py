"""SIGINT and SIGTERM end a process once, in order: a second one must not cut the ending short and leave servers."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Callable
from typing import Any


def cancel_on_signal(task: asyncio.Task[Any], again: Callable[[], None]) -> None:
    """The first signal cancels `task`; each later one only calls `again`."""
    ending = False

    def end() -> None:
        nonlocal ending
        if ending:
            again()
            return
        ending = True
        task.cancel()

    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, end)
