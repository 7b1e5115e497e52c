"""How fast a run goes through its plan, and what that makes of the learning rate. No torch.

Where the time allowed is too short for all planned steps, the schedule is not cut off but run through faster: `done`,
the part of the plan that lies behind, reaches 1 with the last step that still fits, and the learning rate is the
schedule's at `done`. So the rate comes down before the end whatever the speed, without a jump, and follows it when the
speed changes. Where time suffices nothing is touched.
"""

from __future__ import annotations

import json
import math
from collections import deque
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median

from loop.digests import write_durably
from loop.trainers.spec import ScheduleSpec

STATE = "pace.json"  # beside a checkpoint's other files
MEASURED_STEPS = 3  # before a run is judged; the first one compiles kernels and is left out
RECENT_STEPS = 20
RESERVE_STEPS = 2.0  # left for writing the adapter, and because no step takes exactly the median
RESERVE_SHARE = 0.02
COOL_DOWN = 0.1  # last part of a constant schedule that ends early


@dataclass
class Pace:
    """`seconds_allowed` counts from the start of the process, as `elapsed` does; None: no limit."""

    schedule: ScheduleSpec
    planned_steps: int
    seconds_allowed: float | None = None
    done: float = 0.0  # 0..1 of the plan
    limited: bool = False
    ended: bool = False
    _took: deque[float] = field(default_factory=lambda: deque(maxlen=RECENT_STEPS))
    _started: float | None = None
    _steps: int = 0

    def begin_step(self, elapsed: float) -> None:
        if self._started is not None and self._steps > 1:  # from begin to begin: saving and logging are part of it
            self._took.append(elapsed - self._started)
        self._started = elapsed
        self._steps += 1

    def end_step(self, step: int, elapsed: float) -> None:
        """`step` are done; settles whether the run is short of time, and whether this was the last step."""
        left = self.planned_steps - step
        fit = self._fitting(elapsed)
        if fit is not None and fit < left:
            self.limited = True
        if not self.limited:
            self.done = step / self.planned_steps
            return
        left = min(left, left if fit is None else max(fit, 0))
        self.done += (1 - self.done) / (left + 1)
        self.ended = left <= 0

    def rate_factor(self) -> float | None:
        """Of the learning rate, for the next step; None: the plan's own schedule holds."""
        return factor(self.schedule, self.planned_steps, self.done) if self.limited else None

    def seconds_left(self, step: int) -> float | None:
        """Until the last step; None before the speed is known."""
        if not self._took:
            return None
        # `done` grows to 1 evenly, so what is left of it tells the steps that are left of a limited run.
        fit = self._fitting(self._started or 0.0)
        left = self.planned_steps - step
        return round(median(self._took) * (min(left, max(fit, 0)) if self.limited and fit is not None else left), 1)

    def cut_short(self, steps: int) -> bool:
        """Whether time ended the run, which made `steps`."""
        return self.limited and steps < self.planned_steps

    def keep(self, checkpoint: Path) -> None:
        state = {"done": self.done, "limited": self.limited}
        write_durably(checkpoint / STATE, json.dumps(state).encode())

    def take_up(self, checkpoint: Path) -> None:
        """A checkpoint's. One without is of a run that was not short of time."""
        path = checkpoint / STATE
        if path.exists():
            state = json.loads(path.read_bytes())
            self.done, self.limited = float(state["done"]), bool(state["limited"])

    def _fitting(self, elapsed: float) -> int | None:
        """How many more steps the time allows; None: no limit, or nothing measured yet."""
        if self.seconds_allowed is None:
            return None
        if len(self._took) < MEASURED_STEPS:
            return 0 if elapsed >= self.seconds_allowed else None
        usual = median(self._took)
        reserve = RESERVE_STEPS * max(self._took) + RESERVE_SHARE * self.seconds_allowed
        return math.floor((self.seconds_allowed - reserve - elapsed) / usual)


def factor(schedule: ScheduleSpec, planned_steps: int, done: float) -> float:
    """The schedule as a function of the part of the plan that is done, 0..1 of the highest rate.

    The same curves as transformers' and torch's, but for a constant one, which comes down at the end all the same.
    """
    warm = int(schedule.warmup_share * planned_steps) / planned_steps
    if schedule.scheduler == "one_cycle":
        return _one_cycle(schedule.warmup_share, max(planned_steps, 4), done)
    if done < warm:
        return done / warm
    part = min((done - warm) / max(1 - warm, 1e-9), 1.0)
    match schedule.scheduler:
        case "linear":
            return 1 - part
        case "cosine":
            return 0.5 * (1 + math.cos(math.pi * part))
        case _:
            return min(1.0, (1 - part) / COOL_DOWN)


def _one_cycle(warmup_share: float, steps: int, done: float, lowest: float = 1 / 25, last: float = 1 / 25e4) -> float:
    """torch's OneCycleLR with its defaults: cosine up from 1/25, cosine down to 1/250,000; it counts from 0."""
    at, highest = done * steps, min(max(warmup_share, 2 / steps), 1 - 1 / steps) * steps - 1

    def between(start: float, end: float, part: float) -> float:
        return end + (start - end) / 2 * (1 + math.cos(math.pi * min(part, 1.0)))

    if at <= highest:
        return between(lowest, 1.0, at / highest)
    return between(1.0, last, (at - highest) / max(steps - 1 - highest, 1e-9))
