"""One look at a training, and what a detector finds in it."""

from __future__ import annotations

from typing import Protocol

from pydantic import ConfigDict

from labeling.settings import Strict

Work = tuple[str | None, bool]


class Sample(Strict):
    """One look at a training, at `at` seconds of any steady clock: after a step, or between steps (`step` None)."""

    model_config = ConfigDict(extra="ignore", frozen=True)

    at: float
    step: int | None = None
    loss: float | None = None
    grad_norm: float | None = None
    tokens_per_s: float | None = None
    memory_bytes: float | None = None
    objective: str | None = None  # of the part of the method that runs: another one has other losses and gradients
    unquantised: bool = False  # on the served base, which holds and costs something else
    temperature_c: float | None = None
    clock_mhz: float | None = None
    clock_max_mhz: float | None = None
    power_w: float | None = None
    power_cap_w: float | None = None
    power_capped: bool | None = None
    disk_free_bytes: float | None = None
    paused: bool = False  # by us: no step is expected

    @property
    def work(self) -> Work:
        """What a step does: speed and memory are compared with those of the same work only."""
        return self.objective, self.unquantised


class Finding(Strict):
    message: str
    onset_step: int | None = None


class Detector(Protocol):
    kind: str
    hint: str

    def look(self, sample: Sample) -> Finding | None:
        """What is wrong as of this sample."""
