"""A training under watch: starts the trainer, merges its lines with the sensors', raises alarms and does what they ask.

One training may take several attempts: a roll back, a restart or a truce ends the trainer and starts it again from its
last complete checkpoint. The caller sees one call that returns when there is a result, or raises.
"""

from __future__ import annotations

import asyncio
import contextlib
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from labeling.errors import NightschoolError, Unavailable
from loop.executors import ChildControl, ChildFailed, trainer_caches
from loop.stage import StageContext
from loop.trainers.checkpoints import forget_after
from loop.trainers.spec import TrainSpec, write_spec
from loop.training_run import with_smaller_plans
from loop.watch.alarms import Alarm, Alarms
from loop.watch.pausing import Pausing
from loop.watch.samples import Sample
from loop.watch.sensors import Reading, Sensors
from loop.watch.truce import Truce
from loop.watch.usage import Meter, Usage

PARK_SECONDS = 60.0  # for the step that runs and its checkpoint
GRACE_SHARE, GRACE_SECONDS = 0.05, 120.0  # beyond the hours allowed, for a trainer that does not end by itself
ENDING = frozenset({"roll_back", "restart", "stop"})
USAGE_SECONDS = 30.0
DIVERGED, PARKED = "training_diverged", "parked"


class StoppedByAlarm(NightschoolError):
    code = "stopped_by_alarm"


class TookTooLong(NightschoolError):
    code = "took_too_long"
    default_hint = "Raise trainer.hours_allowed or train less; `night run --resume` goes on from the last checkpoint."


@dataclass
class Supervisor:
    """`spec` is written anew for each attempt. `show` gets every line: the trainer's and the sensors' in one."""

    context: StageContext
    spec: TrainSpec
    run_id: str
    sensors: Sensors
    usage: Usage
    show: Callable[[dict[str, Any]], None]
    _line: dict[str, Any] = field(default_factory=dict)
    _reading: Reading | None = None
    _open: dict[str, Alarm] = field(default_factory=dict)  # raised and not over
    _unsaid: list[Alarm] = field(default_factory=list)
    _order: Alarm | None = None  # what ends this attempt
    _steps: int = 0
    _spent: int = 0  # roll backs and restarts of this run; the usage also counts an earlier, killed worker's
    _paused_s: float = 0.0
    _attempt: asyncio.Task[None] | None = None
    _control: ChildControl | None = None
    _parking: bool = False

    def __post_init__(self) -> None:
        trainer = self.context.project.trainer
        self._settings = trainer.alarms
        self._alarms = Alarms(trainer.alarms, trainer.max_grad_norm)
        self._pausing = Pausing(trainer.alarms.slow_down_share)
        self._truce = Truce.of(self.context)
        self._meter = Meter(self.usage)
        self._started = time.monotonic()
        self._seconds_allowed = trainer.hours_allowed * 3600
        self.usage.kind, self.usage.cards = self.sensors.kind, self.spec.cards.gpus

    async def train(self) -> None:
        """Until the trainer has written its result. Raises StoppedByAlarm, TookTooLong, or what the trainer said."""
        watching = [
            asyncio.create_task(self._watch(), name="watch training"),
            asyncio.create_task(self._pausing.run(), name="slow training"),
        ]
        try:
            async with self._truce.kept(self._truce_says):
                while not await self._one_attempt():
                    self._alarms.restart()
                    self._open.clear()
                    self._pausing.slowed_by.clear()
        finally:
            for task in watching:
                task.cancel()
            await asyncio.gather(*watching, return_exceptions=True)
            await self._tell()
            await asyncio.to_thread(self._look_at_sensors)
            self.usage.write(self.context.folder)

    async def _one_attempt(self) -> bool:
        """True when there is a result; False when the trainer is to be started again."""
        await self._truce.allowed()
        if self._order is not None:  # raised while nothing ran
            return await self._follow(self._order)
        self._parking = False
        left = self._seconds_allowed - (time.monotonic() - self._started)
        if left <= 0:
            raise self._too_long()
        limits = self.spec.limits.model_copy(update={"seconds": left})
        write_spec(self.spec.model_copy(update={"limits": limits}), self.context.folder / "spec.json")
        self._attempt = asyncio.create_task(self._child(), name="trainer")
        try:
            await self._ended_in(left + max(GRACE_SECONDS, GRACE_SHARE * self._seconds_allowed))
        finally:
            await self._end_child()
        return await self._judge(self._attempt)

    async def _ended_in(self, seconds: float) -> None:
        """Time that production took from the trainer is added, as much again at most."""
        assert self._attempt is not None
        began, paused = time.monotonic(), self._pausing.seconds
        while not self._attempt.done():
            granted = seconds + min(self._pausing.seconds - paused, self._seconds_allowed)
            left = began + granted - time.monotonic()
            if left <= 0:
                raise self._too_long()
            await asyncio.wait({self._attempt}, timeout=left)

    async def _child(self) -> None:
        trainer = self.context.project.trainer
        await with_smaller_plans(
            lambda: self.context.clients.executor.run(
                f"loop.trainers.{trainer.backend}",
                self.context.folder / "spec.json",
                on_progress=self._on_progress,
                log_path=self.context.folder / "trainer.log",
                environment=trainer_caches(self.context.data_dir),
                python=trainer.python,
                on_start=self._on_start,
            ),
            self.spec.out_dir,
            lambda plan: self.context.log.warning("memory_fell_back", **plan.model_dump()),
        )

    def _on_start(self, control: ChildControl) -> None:
        self._control = control
        self._pausing.take(control)

    async def _end_child(self) -> None:
        assert self._attempt is not None
        self._pausing.let_go()
        if not self._attempt.done():
            self._attempt.cancel()
        await asyncio.wait({self._attempt})

    async def _judge(self, attempt: asyncio.Task[None]) -> bool:
        """What the end of an attempt means."""
        if not attempt.cancelled():
            error = attempt.exception()
            if error is None:
                return True
            parked = self._parking and isinstance(error, ChildFailed) and error.child_code == PARKED
            if isinstance(error, ChildFailed) and error.child_code == DIVERGED and self._steps:
                self._order = self._alarms.not_a_number(self._steps, str(error))
                self._raise(self._order)
            elif not parked:
                raise error
        if self._order is None:
            return False  # the truce wants the machine back for a while
        return await self._follow(self._order)

    async def _follow(self, alarm: Alarm) -> bool:
        self._order = None
        await self._tell()
        self._obey(alarm)
        return False

    def _obey(self, alarm: Alarm) -> None:
        """Prepares the next attempt, or raises."""
        spent = self._spent
        if alarm.action == "stop" or spent >= self._settings.max_roll_backs:
            again = f" (after {spent} roll backs or restarts)" if spent else ""
            raise StoppedByAlarm(f"{alarm.kind.replace('_', ' ')}: {alarm.message}{again}", hint=alarm.hint)
        self._spent += 1
        if alarm.action == "restart":
            self.usage.restarts += 1
            return
        self.usage.roll_backs += 1
        forget_after(self.spec.out_dir, alarm.onset_step or 0)
        scale = self.spec.limits.rate_scale * self._settings.rate_factor
        self.spec = self.spec.model_copy(update={"limits": self.spec.limits.model_copy(update={"rate_scale": scale})})

    def _on_progress(self, line: dict[str, Any]) -> None:
        self._steps = line["step"]
        self._line = line
        self._look(step=line)
        self._show()

    async def _watch(self) -> None:
        """Between steps, too: a trainer that hangs tells nothing."""
        written = time.monotonic()
        while True:
            await asyncio.to_thread(self._look_at_sensors)
            self._look(step=None)
            self._show()
            await self._tell()
            if time.monotonic() - written > USAGE_SECONDS:
                self.usage.write(self.context.folder)
                written = time.monotonic()
            await asyncio.sleep(self._settings.sensor_seconds)

    def _look_at_sensors(self) -> None:
        self._reading = self.sensors.read()
        self._meter.add(time.monotonic(), self._reading, paused=self._pausing.paused)

    def _look(self, step: dict[str, Any] | None) -> None:
        paused_s = self._pausing.seconds
        values = {**(self._reading.shown() if self._reading else {}), **(step or {})}
        values["at"] = time.monotonic()
        waiting = self._attempt is None or self._attempt.done()
        values["paused"] = waiting or self._pausing.paused or (step is not None and paused_s > self._paused_s)
        with contextlib.suppress(OSError):
            values["disk_free_bytes"] = shutil.disk_usage(self.context.data_dir).free
        if step is not None:
            self._paused_s = paused_s
        for alarm in self._alarms.look(Sample.model_validate(values)):
            self._raise(alarm)

    def _raise(self, alarm: Alarm) -> None:
        self._unsaid.append(alarm)
        self.usage.raise_alarm(alarm)
        log = self.context.log.info if alarm.over else self.context.log.warning
        log("training_alarm", kind=alarm.kind, action=alarm.action, over=alarm.over, reason=alarm.message)
        if alarm.over:
            self._open.pop(alarm.kind, None)
            self._pausing.slowed_by.discard(alarm.kind)
            return
        self._open[alarm.kind] = alarm
        if alarm.action == "slow_down":
            self._pausing.slowed_by.add(alarm.kind)
        elif alarm.action in ENDING and self._order is None:
            self._order = alarm
            if self._attempt is not None:
                self._attempt.cancel()

    def _show(self) -> None:
        """One line of everything; before the first step only what the sensors say."""
        sensed = self._reading.shown() if self._reading else {}
        told: dict[str, Any] = {**sensed, **self._line}
        if self._open:
            told["alarms"] = [f"{alarm.kind}: {alarm.message}" for alarm in self._open.values()]
        if self._pausing.reasons:
            told["paused"] = ", ".join(sorted(self._pausing.reasons))
        if self._pausing.slowed_by:
            told["slowed_by"] = ", ".join(sorted(self._pausing.slowed_by))
        self.show(told)

    async def _tell(self) -> None:
        """Alarms into the night's events and the run's tags. A registry that is down costs tags, not the training."""
        alarms, self._unsaid = self._unsaid, []
        for alarm in alarms:
            with contextlib.suppress(Unavailable):
                await self.context.record("alarm", {"alarm": alarm.kind, **alarm.model_dump(exclude={"kind"})})
        tags = {
            f"nightschool.alarm.{alarm.kind}": f"{alarm.action}: {alarm.message}" for alarm in alarms if not alarm.over
        }
        if tags:
            try:
                await self.context.clients.registry.tag_run(self.run_id, tags)
            except Unavailable as error:
                self.context.log.warning("alarms_not_tagged", kinds=sorted(tags), reason=str(error))

    async def _truce_says(self, broken: str | None) -> None:
        """Production needs the machine, and why; None: it has it no longer."""
        if broken is None:
            self._pausing.go_on("truce")
        elif self._truce.gives_memory_back:
            await self._park()
        else:
            self._pausing.pause("truce")
        if broken is not None:
            self.usage.note(f"paused for production: {broken}")
            with contextlib.suppress(Unavailable):
                await self.context.record("note", {"truce": broken})

    async def _park(self) -> None:
        if self._attempt is None or self._attempt.done() or self._control is None:
            return
        self._parking = True
        if self._control.park():
            await asyncio.wait({self._attempt}, timeout=PARK_SECONDS)
        self._attempt.cancel()  # one that has hardly begun has nothing to write first

    def _too_long(self) -> TookTooLong:
        hours = self.context.project.trainer.hours_allowed
        waited = self._pausing.seconds
        told = f", {waited / 3600:.1f} of them waiting for production" if waited > 60 else ""
        return TookTooLong(f"training took longer than trainer.hours_allowed = {hours:g}{told}")


def earlier_attempt(folder: Path) -> Path | None:
    """The newest folder of the same stage that an earlier, killed worker left."""
    stage = folder.name.rpartition(".")[0]
    earlier = [
        path for path in folder.parent.glob(f"{stage}.*") if path.name != folder.name and (path / "out").is_dir()
    ]
    return max(earlier, key=lambda path: int(path.name.rpartition(".")[2]), default=None)
