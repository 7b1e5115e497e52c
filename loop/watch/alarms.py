"""What is wrong with a training, told from a series of samples: the same code over a live one and a recorded one.

A detector looks at one sample at a time and says what is wrong now, or nothing; `Alarms` raises it once, and says when
it is over.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from labeling.settings import Strict
from loop.watch.machine_alarms import Capped, FullDisk, Hot, Silence
from loop.watch.samples import Detector, Sample
from loop.watch.settings import AlarmSettings
from loop.watch.step_alarms import GradientNorms, GrowingMemory, LossSpikes, SlowTokens


class Alarm(Strict):
    """`onset_step`: the last step before it began; a roll back goes to a checkpoint of that step or an earlier one."""

    kind: str
    action: str
    message: str
    hint: str
    step: int | None = None
    onset_step: int | None = None
    over: bool = False


class Alarms:
    """Samples in, alarms out: each raised once, and once more with `over` when it has passed."""

    def __init__(self, settings: AlarmSettings, clip: float) -> None:
        self._settings, self._clip = settings, clip
        self._raised: set[str] = set()
        self.restart()

    def restart(self) -> None:
        """After a roll back: other steps come, and a scale of the old ones says nothing about them."""
        settings, clip = self._settings, self._clip
        every: Iterable[tuple[Detector, Any]] = (
            (LossSpikes(settings.loss_spike), settings.loss_spike),
            (GradientNorms(settings.gradient_norm, clip), settings.gradient_norm),
            (SlowTokens(settings.throughput), settings.throughput),
            (GrowingMemory(settings.memory_growth), settings.memory_growth),
            (Hot(settings.temperature), settings.temperature),
            (Capped(settings.power_capped), settings.power_capped),
            (FullDisk(settings.disk_filling), settings.disk_filling),
            (Silence(settings.no_progress), settings.no_progress),
        )
        self._detectors = [(detector, one.action) for detector, one in every if one.action != "off"]
        self._raised.clear()

    def look(self, sample: Sample) -> list[Alarm]:
        found = [self._of(detector, action, sample) for detector, action in self._detectors]
        return [alarm for alarm in found if alarm is not None]

    def not_a_number(self, step: int | None, message: str) -> Alarm:
        """The trainer itself notices, and ends."""
        hint = "Lower trainer.learning_rate, or look for broken rows in this night's delta."
        action = self._settings.not_a_number.action
        return Alarm(kind="not_a_number", action=action, message=message, hint=hint, step=step, onset_step=step)

    def _of(self, detector: Detector, action: str, sample: Sample) -> Alarm | None:
        finding = detector.look(sample)
        was, now = detector.kind in self._raised, finding is not None
        if was == now:
            return None
        (self._raised.add if now else self._raised.discard)(detector.kind)
        return Alarm(
            kind=detector.kind,
            action=action,
            message=finding.message if finding else f"{detector.kind.replace('_', ' ')}: over",
            hint=detector.hint if finding else "",
            step=sample.step,
            onset_step=finding.onset_step if finding else None,
            over=not now,
        )
