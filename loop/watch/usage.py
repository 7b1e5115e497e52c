"""What a training has used: time on the accelerator, measured energy, and the alarms it raised. Survives a restart."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic import BaseModel, Field

from loop.digests import write_durably
from loop.watch.alarms import Alarm
from loop.watch.sensors import Reading

FILE = "usage.json"
LONGEST_GAP_SECONDS = 30.0  # between two readings; what lies in a longer one was not measured
ENOUGH_MEASURED = 0.95  # of the time; less makes the energy unknown
ALARMS_KEPT = 100


class Usage(BaseModel):
    """`energy_j` is the integral of measured power over `measured_s` of `seconds`: trapezoids between readings."""

    device: str = ""
    kind: str = "none"
    cards: int = 1  # that train; the first one is measured
    seconds: float = 0.0
    paused_s: float = 0.0
    measured_s: float = 0.0
    energy_j: float = 0.0
    highest_temperature_c: float | None = None
    highest_power_w: float | None = None
    roll_backs: int = 0
    restarts: int = 0
    alarms: list[Alarm] = Field(default_factory=list)
    notes: list[str] = Field(default_factory=list)

    def raise_alarm(self, alarm: Alarm) -> None:
        if len(self.alarms) < ALARMS_KEPT:
            self.alarms.append(alarm)

    def note(self, text: str) -> None:
        if text not in self.notes:
            self.notes.append(text)

    def told(self) -> dict[str, Any]:
        """For reports. `energy_wh` is None unless nearly all of the time was measured, on one card."""
        known = self.cards == 1 and self.seconds > 0 and self.measured_s >= ENOUGH_MEASURED * self.seconds
        return {
            "device": self.device,
            "seconds": round(self.seconds, 1),
            "paused_seconds": round(self.paused_s, 1),
            "gpu_minutes": round(self.cards * self.seconds / 60, 2) if self.kind == "gpu" else None,
            "energy_wh": round(self.energy_j / 3600, 3) if known else None,
            "highest_temperature_c": self.highest_temperature_c,
            "highest_power_w": self.highest_power_w,
            "roll_backs": self.roll_backs,
            "restarts": self.restarts,
            "alarms": [alarm.model_dump() for alarm in self.alarms],
            "notes": list(self.notes),
        }

    def write(self, folder: Path) -> None:
        write_durably(folder / FILE, self.model_dump_json().encode())

    @classmethod
    def read(cls, folder: Path) -> Usage:
        """An earlier attempt's; a new one where there was none."""
        path = folder / FILE
        return cls.model_validate_json(path.read_bytes()) if path.exists() else cls()


class Meter:
    """Adds readings to a usage, at seconds of any steady clock."""

    def __init__(self, usage: Usage) -> None:
        self._usage = usage
        self._last: tuple[float, float | None] | None = None

    def add(self, at: float, reading: Reading | None, *, paused: bool = False) -> None:
        """`paused`: nothing was trained since the last reading."""
        usage, watts = self._usage, None if reading is None else reading.power_w
        if self._last is not None:
            since, before = self._last
            gap = at - since
            usage.seconds += gap
            usage.paused_s += gap if paused else 0.0
            if watts is not None and before is not None and gap <= LONGEST_GAP_SECONDS:
                usage.measured_s += gap
                usage.energy_j += gap * (watts + before) / 2
        self._last = (at, watts)
        if reading is not None:
            usage.device = reading.device or usage.device
            usage.highest_temperature_c = _higher(usage.highest_temperature_c, reading.temperature_c)
            usage.highest_power_w = _higher(usage.highest_power_w, watts)


def _higher(before: float | None, now: float | None) -> float | None:
    return now if before is None or (now is not None and now > before) else before
