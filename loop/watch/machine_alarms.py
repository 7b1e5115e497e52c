"""Alarms of the machine around a training: heat, power, disk, and a trainer that says nothing."""

from __future__ import annotations

from collections import deque
from statistics import median

from loop.watch.samples import Finding, Sample
from loop.watch.settings import DiskFilling, NoProgress, PowerCapped, Temperature

COOLER = 5.0  # degrees below the limit until a hot card counts as cooled down
AT_CAP = 0.97  # of the limit: where the driver does not say itself that it caps
STEPS_AWAY = 20  # no progress: at least so many median steps


class Hot:
    kind = "temperature"
    hint = "Look at fans and airflow. While it is too hot, the trainer works part of the time."

    def __init__(self, settings: Temperature) -> None:
        self._settings = settings
        self._since: float | None = None
        self._raised = False

    def look(self, sample: Sample) -> Finding | None:
        degrees = sample.temperature_c
        if degrees is not None:
            limit = self._settings.celsius - (COOLER if self._raised else 0)
            self._since = (sample.at if self._since is None else self._since) if degrees > limit else None
            long = self._since is not None and sample.at - self._since >= self._settings.seconds
            self._raised = long or (self._raised and degrees > limit)
        told = f"{degrees:.0f} C" if degrees is not None else "too hot"
        return Finding(message=f"{told}, above {self._settings.celsius:g} C") if self._raised else None


class Capped:
    kind = "power_capped"
    hint = "Raise the card's power limit, or leave it: the same training takes longer."

    def __init__(self, settings: PowerCapped) -> None:
        self._settings = settings
        self._since: float | None = None

    def look(self, sample: Sample) -> Finding | None:
        if sample.power_w is None:
            return None
        self._since = (sample.at if self._since is None else self._since) if self._capped(sample) else None
        if self._since is None or sample.at - self._since < self._settings.seconds:
            return None
        cap = f"{sample.power_cap_w:.0f} W" if sample.power_cap_w else "its limit"
        return Finding(message=f"power {sample.power_w:.0f} W at {cap}{_clock(sample)}")

    def _capped(self, sample: Sample) -> bool:
        at_cap = bool(sample.power_w and sample.power_cap_w and sample.power_w >= AT_CAP * sample.power_cap_w)
        told = at_cap if sample.power_capped is None else sample.power_capped
        known = sample.clock_mhz is not None and sample.clock_max_mhz
        slow = not known or (sample.clock_mhz or 0) < self._settings.clock_share * (sample.clock_max_mhz or 0)
        return told and slow


def _clock(sample: Sample) -> str:
    if sample.clock_mhz is None or not sample.clock_max_mhz:
        return ""
    return f"; clock {sample.clock_mhz:.0f} of {sample.clock_max_mhz:.0f} MHz"


class FullDisk:
    kind = "disk_filling"
    hint = "Free disk space or move data_dir, then `nightschool night run --resume`; it goes on from a checkpoint."

    def __init__(self, settings: DiskFilling) -> None:
        self._limit = settings.free_gb * 1e9
        self._now: Finding | None = None

    def look(self, sample: Sample) -> Finding | None:
        free = sample.disk_free_bytes
        if free is not None:
            message = f"{free / 1e9:.2f} GB free on the disk of data_dir, less than {self._limit / 1e9:g} GB"
            self._now = Finding(message=message) if free < self._limit else None
        return self._now


class Silence:
    kind = "no_progress"
    hint = "The trainer's log shows where it hangs; a lost GPU or a full machine does it."

    def __init__(self, settings: NoProgress) -> None:
        self._settings = settings
        self._stepped = False
        self._waited = 0.0
        self._looked: float | None = None
        self._took: deque[float] = deque(maxlen=STEPS_AWAY)

    def look(self, sample: Sample) -> Finding | None:
        """Only time between two looks in which nothing was paused counts as waiting."""
        if self._looked is not None and not sample.paused:
            self._waited += sample.at - self._looked
        self._looked = sample.at
        if sample.step is not None:
            if self._stepped:
                self._took.append(self._waited)
            self._stepped, self._waited = True, 0.0
            return None
        if not self._stepped:
            limit, since = self._settings.start_seconds, "since the start"
        else:
            usual = median(self._took) if self._took else 0.0
            limit, since = max(self._settings.seconds, STEPS_AWAY * usual), "since the last step"
        return Finding(message=f"no step for {self._waited:.0f} s {since}") if self._waited > limit else None
