"""One look at a training, and what a detector finds in it."""

from __future__ import annotations

from typing import Protocol

from pydantic import ConfigDict

from labeling.settings import Strict


class Sample(Strict):
    """One look at a training, at `at` seconds of any steady clock: after a step, or between steps (`step` None)."""

    model_config = ConfigDict(extra="ignore", frozen=True)

    at: float
    step: int | None = None
    loss: float | None = None
    grad_norm: float | None = None
    tokens_per_s: float | None = None
    memory_bytes: float | None = None
    unquantised: bool = False  # on the served base, which holds and costs something else
    temperature_c: float | None = None
    clock_mhz: float | None = None
    clock_max_mhz: float | None = None
    power_w: float | None = None
    power_cap_w: float | None = None
    power_capped: bool | None = None
    disk_free_bytes: float | None = None
    paused: bool = False  # by us: no step is expected


class Finding(Strict):
    message: str
    onset_step: int | None = None


class Detector(Protocol):
    kind: str
    hint: str

    def look(self, sample: Sample) -> Finding | None:
        """What is wrong as of this sample."""
