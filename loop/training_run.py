"""One training through as many trainer processes as it takes to find a memory plan that holds."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from pathlib import Path

from loop.executors import ChildCrashed, ChildFailed
from loop.machine_memory import oom_kills
from loop.memory_plan import Plan
from loop.memory_record import fall_back

OUT_OF_MEMORY = "out_of_memory"  # the trainer's word for it


async def with_smaller_plans(
    start: Callable[[], Awaitable[None]], out_dir: Path, on_fall_back: Callable[[Plan], None]
) -> None:
    """Awaits `start`, which runs one trainer process to its end, once for each plan that ran out of memory.

    A new process each time: nothing of the last one's memory is left, and it goes on from the last checkpoint. Raises
    what `start` raises when it is something else, or when there is no smaller plan.
    """
    while True:
        killed = oom_kills()
        try:
            await start()
            return
        except ChildFailed as error:
            if error.child_code != OUT_OF_MEMORY or not _next(out_dir, on_fall_back):
                raise
        except ChildCrashed:
            # Killed by the kernel, the trainer can't say why; killed by a person, it must not be started again.
            if oom_kills() == killed or not _next(out_dir, on_fall_back):
                raise


def _next(out_dir: Path, on_fall_back: Callable[[Plan], None]) -> bool:
    plan = fall_back(out_dir)
    if plan is not None:
        on_fall_back(plan)
    return plan is not None
