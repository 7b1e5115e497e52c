"""One reader of sensors for whatever there is: an NVIDIA GPU by NVML, else the host; or a recording.

A reading that a card or driver does not give is None, never a guess.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

import pynvml
import structlog
from pydantic import Field

from labeling.settings import Strict

log = structlog.get_logger()
SW_POWER_CAP = 0x4  # NVML's nvmlClocksEventReasonSwPowerCap
THERMAL = 0x20 | 0x40  # SwThermalSlowdown, HwThermalSlowdown


class Reading(Strict):
    """What the sensors say now. `utilisation` is 0..1; `load` is the host's runnable processes a core."""

    device: str = ""
    temperature_c: float | None = None
    power_w: float | None = None
    power_cap_w: float | None = None
    clock_mhz: float | None = None
    clock_max_mhz: float | None = None
    utilisation: float | None = None
    gpu_memory_bytes: float | None = None
    gpu_memory_total_bytes: float | None = None
    power_capped: bool | None = Field(None, description="The driver says that it holds the clock down for power")
    too_hot: bool | None = Field(None, description="... or for heat")
    host_memory_bytes: float | None = None
    host_memory_total_bytes: float | None = None
    load: float | None = None

    def shown(self) -> dict[str, Any]:
        """Without what is not known."""
        return self.model_dump(exclude_none=True)


class Sensors(Protocol):
    """`kind` is gpu, host, or none. `read` may block for a second; None when there is nothing (more) to read."""

    @property
    def kind(self) -> str: ...
    def read(self) -> Reading | None: ...
    def close(self) -> None: ...


def open_sensors(device: str | None) -> Sensors:
    """The best there is. `device`: as CUDA_VISIBLE_DEVICES names it, an index or the beginning of a UUID. None: no
    card is trained on, and none is metered.

    No sensors at all are no error: it is said once, in the log, and the night goes on without.
    """
    if device is not None:
        with contextlib.suppress(NoSensors):
            return NvmlSensors(pynvml, device)
    if HostSensors.there():
        log.info("sensors", kind="host", hint="No NVIDIA driver: no temperature, power and clock of an accelerator.")
        return HostSensors()
    log.info("sensors", kind="none", hint="Neither an NVIDIA driver nor /proc: the training is watched by its steps.")
    return NoReadings()


class NoSensors(Exception):
    """No driver, no such card, or no right to ask."""


class NvmlSensors:
    """One GPU by NVIDIA's management library, which needs the driver only: no CUDA context, no memory on the card."""

    kind = "gpu"

    def __init__(self, nvml: Any, device: str) -> None:
        self._nvml = nvml
        try:
            nvml.nvmlInit()
            self._handle = self._find(device)
            self._name = str(nvml.nvmlDeviceGetName(self._handle))
        except nvml.NVMLError as error:
            raise NoSensors(str(error)) from error
        self._host = HostSensors()

    def read(self) -> Reading:
        nvml, handle = self._nvml, self._handle
        memory = self._get(lambda: nvml.nvmlDeviceGetMemoryInfo(handle))
        use = self._get(lambda: nvml.nvmlDeviceGetUtilizationRates(handle).gpu)
        reasons = self._get(lambda: nvml.nvmlDeviceGetCurrentClocksEventReasons(handle))
        clock = nvml.NVML_CLOCK_SM
        return self._host.read().model_copy(
            update={
                "device": self._name,
                "temperature_c": self._get(
                    lambda: float(nvml.nvmlDeviceGetTemperature(handle, nvml.NVML_TEMPERATURE_GPU))
                ),
                "power_w": self._get(lambda: nvml.nvmlDeviceGetPowerUsage(handle) / 1000),
                "power_cap_w": self._get(lambda: nvml.nvmlDeviceGetEnforcedPowerLimit(handle) / 1000),
                "clock_mhz": self._get(lambda: float(nvml.nvmlDeviceGetClockInfo(handle, clock))),
                "clock_max_mhz": self._get(lambda: float(nvml.nvmlDeviceGetMaxClockInfo(handle, clock))),
                "utilisation": None if use is None else use / 100,
                "gpu_memory_bytes": None if memory is None else float(memory.used),
                "gpu_memory_total_bytes": None if memory is None else float(memory.total),
                "power_capped": None if reasons is None else bool(reasons & SW_POWER_CAP),
                "too_hot": None if reasons is None else bool(reasons & THERMAL),
            }
        )

    def close(self) -> None:
        with contextlib.suppress(self._nvml.NVMLError):
            self._nvml.nvmlShutdown()

    def _find(self, device: str) -> Any:
        nvml = self._nvml
        if device.startswith(("GPU-", "MIG-")):
            every = (nvml.nvmlDeviceGetHandleByIndex(index) for index in range(nvml.nvmlDeviceGetCount()))
            found = next((one for one in every if str(nvml.nvmlDeviceGetUUID(one)).startswith(device)), None)
            return found or nvml.nvmlDeviceGetHandleByUUID(device)
        return nvml.nvmlDeviceGetHandleByIndex(int(device) if device.isdecimal() else 0)

    def _get(self, ask: Any) -> Any:
        """None for what this card does not support, a lost one included: the next reading may know it."""
        try:
            return ask()
        except self._nvml.NVMLError:
            return None


class HostSensors:
    """This machine's memory and load."""

    kind = "host"

    @staticmethod
    def there() -> bool:
        return Path("/proc/meminfo").exists()

    def read(self) -> Reading:
        with contextlib.suppress(OSError, KeyError, ValueError):
            lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
            kib = {name: int(rest.split()[0]) for name, _, rest in (line.partition(":") for line in lines)}
            total, free = kib["MemTotal"] * 1024, kib["MemAvailable"] * 1024
            load = os.getloadavg()[0] / (os.cpu_count() or 1)
            return Reading(host_memory_bytes=total - free, host_memory_total_bytes=total, load=round(load, 3))
        return Reading()

    def close(self) -> None:
        return


class NoReadings:
    kind = "none"

    def read(self) -> Reading | None:
        return None

    def close(self) -> None:
        return


class RecordedSensors:
    """A recorded series, a JSON reading a line (and `at` when it was taken), for tests and looking back."""

    def __init__(self, path: Path, kind: str = "gpu") -> None:
        self.kind = kind
        lines = (json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line)
        self._left: Iterator[Reading] = (
            Reading.model_validate({name: value for name, value in line.items() if name != "at"}) for line in lines
        )

    def read(self) -> Reading | None:
        return next(self._left, None)

    def close(self) -> None:
        return
