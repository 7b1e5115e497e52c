"""Sensors: one reading whatever gives it, None for what is not known, and energy that is measured or not told."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from structlog.testing import capture_logs

from loop.machine_memory import visible_card
from loop.watch import sensors
from loop.watch.alarms import Alarm
from loop.watch.sensors import HostSensors, NoReadings, NoSensors, NvmlSensors, Reading, RecordedSensors, open_sensors
from loop.watch.usage import Meter, Usage


class Nvml:
    """The calls of NVIDIA's library, with one card; whatever stands in `broken` answers as an older card does."""

    NVML_TEMPERATURE_GPU, NVML_CLOCK_SM = 0, 1

    class NVMLError(Exception):
        pass

    def __init__(self, *broken: str, cards: tuple[str, ...] = ("GPU-aa", "GPU-bb")) -> None:
        self.broken, self.cards = broken, cards

    def __getattr__(self, name: str) -> Any:
        answers: dict[str, Any] = {
            "nvmlInit": lambda: None,
            "nvmlShutdown": lambda: None,
            "nvmlDeviceGetCount": lambda: len(self.cards),
            "nvmlDeviceGetHandleByIndex": lambda index: self.cards[index],
            "nvmlDeviceGetUUID": lambda handle: handle,
            "nvmlDeviceGetName": lambda handle: f"card {handle}",
            "nvmlDeviceGetMemoryInfo": lambda handle: SimpleNamespace(used=5, total=10),
            "nvmlDeviceGetUtilizationRates": lambda handle: SimpleNamespace(gpu=93),
            "nvmlDeviceGetCurrentClocksEventReasons": lambda handle: 0x4,
            "nvmlDeviceGetTemperature": lambda handle, kind: 61,
            "nvmlDeviceGetPowerUsage": lambda handle: 412_500,
            "nvmlDeviceGetEnforcedPowerLimit": lambda handle: 700_000,
            "nvmlDeviceGetClockInfo": lambda handle, kind: 1755,
            "nvmlDeviceGetMaxClockInfo": lambda handle, kind: 1980,
        }

        def call(*args: Any) -> Any:
            if name in self.broken:
                raise self.NVMLError("Not Supported")
            return answers[name](*args)

        return call


def test_a_gpus_reading_is_in_our_units() -> None:
    """Watts, degrees, fractions of one; the cap that the driver tells."""
    reading = NvmlSensors(Nvml(), "").read()
    assert (reading.device, reading.temperature_c, reading.power_w, reading.power_cap_w) == (
        "card GPU-aa",
        61,
        412.5,
        700,
    )
    assert (reading.utilisation, reading.clock_mhz, reading.power_capped, reading.too_hot) == (0.93, 1755, True, False)
    assert (reading.gpu_memory_bytes, reading.gpu_memory_total_bytes) == (5, 10)


def test_what_a_card_does_not_tell_is_none() -> None:
    """Never zero, never a guess; the rest is there."""
    reading = NvmlSensors(Nvml("nvmlDeviceGetPowerUsage", "nvmlDeviceGetCurrentClocksEventReasons"), "").read()
    assert (reading.power_w, reading.power_capped, reading.temperature_c) == (None, None, 61)
    assert "power_w" not in reading.shown()


def test_the_card_that_the_trainer_sees_is_read() -> None:
    """By index or by the beginning of its UUID, as CUDA_VISIBLE_DEVICES names it."""
    assert NvmlSensors(Nvml(), "1").read().device == "card GPU-bb"
    assert NvmlSensors(Nvml(), "GPU-b").read().device == "card GPU-bb"


def test_no_driver_is_said_once_and_is_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """Then the host's own sensors; where even these are missing, none."""
    with pytest.raises(NoSensors):
        NvmlSensors(Nvml("nvmlInit"), "")
    monkeypatch.setattr(sensors, "pynvml", Nvml("nvmlInit"))
    with capture_logs() as logs:
        found = open_sensors("0")
    assert isinstance(found, HostSensors)
    assert [(line["log_level"], line["kind"]) for line in logs] == [("info", "host")]
    monkeypatch.setattr(HostSensors, "there", staticmethod(lambda: False))
    none = open_sensors("0")
    assert isinstance(none, NoReadings)
    assert none.read() is None


def test_the_hosts_reading_knows_memory_and_load() -> None:
    reading = HostSensors().read()
    assert reading.host_memory_bytes is not None
    assert reading.host_memory_total_bytes is not None
    assert 1e8 < reading.host_memory_bytes < reading.host_memory_total_bytes
    assert reading.load is not None
    assert reading.power_w is None


def recorded(folder: Path, *watts: float | None) -> RecordedSensors:
    path = folder / "readings.jsonl"
    path.write_text("".join(json.dumps({"device": "card", "power_w": one}) + "\n" for one in watts))
    return RecordedSensors(path)


def used(folder: Path, seconds: float, *watts: float | None) -> Usage:
    source, usage = recorded(folder, *watts), Usage(kind="gpu")
    meter, at = Meter(usage), 0.0
    while (reading := source.read()) is not None:
        meter.add(at, reading)
        at += seconds
    return usage


def test_a_card_that_is_hidden_is_not_metered(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its minutes and energy would be told as those of a training on the CPU."""
    monkeypatch.setattr(sensors, "pynvml", Nvml())
    for hidden in ("", "-1"):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", hidden)
        assert open_sensors(visible_card()).kind == "host"
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1,0")
    seen = open_sensors(visible_card()).read()
    assert seen is not None
    assert seen.device == "card GPU-bb"


def test_energy_is_the_integral_of_measured_power(tmp_path: Path) -> None:
    """100 W to 300 W over 10 s, then 300 W for 10 s: 2,000 J + 3,000 J."""
    usage = used(tmp_path, 10.0, 100, 300, 300)
    assert usage.energy_j == 5000
    assert usage.told()["energy_wh"] == pytest.approx(5000 / 3600, abs=1e-3)
    assert usage.told()["gpu_minutes"] == pytest.approx(20 / 60, abs=1e-2)
    assert usage.highest_power_w == 300


def test_energy_that_was_not_measured_is_not_told(tmp_path: Path) -> None:
    """No power sensor, gaps between readings, a host without one: null, not a number."""
    assert used(tmp_path, 10.0, None, None, None).told()["energy_wh"] is None
    assert used(tmp_path, 10.0, 100, None, 100).told()["energy_wh"] is None
    assert used(tmp_path, 60.0, 100, 100).told()["energy_wh"] is None
    assert Usage(kind="host", seconds=10).told()["gpu_minutes"] is None


RECORDED = Path(__file__).parent.parent / "recorded" / "h100_full_load.jsonl"


def test_a_real_cards_series_is_read_and_summed() -> None:
    """An H100 under matrix products for 70 s, then idle: 700 W against its cap, 13.6 Wh, 78 C at most."""
    source, usage = RecordedSensors(RECORDED), Usage(kind="gpu")
    meter = Meter(usage)
    for line in RECORDED.read_text().splitlines():
        meter.add(json.loads(line)["at"], source.read())
    told = usage.told()
    assert source.read() is None
    assert told["energy_wh"] == pytest.approx(13.6, abs=0.5)
    assert (told["highest_temperature_c"], told["device"]) == (78, "NVIDIA H100 80GB HBM3")
    assert told["highest_power_w"] < 700


def test_usage_survives_the_process(tmp_path: Path) -> None:
    """A killed worker's energy and alarms are taken over by the next one."""
    usage = used(tmp_path, 10.0, 100, 100)
    usage.raise_alarm(Alarm(kind="temperature", action="warn", message="hot", hint=""))
    usage.write(tmp_path)
    again = Usage.read(tmp_path)
    Meter(again).add(0.0, Reading(power_w=5))
    assert again.energy_j == 1000
    assert again.told()["alarms"][0]["kind"] == "temperature"
    assert Usage.read(tmp_path / "nowhere") == Usage()
