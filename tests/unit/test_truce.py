"""The truce with production: hours, the latency objective measured at a replica's /metrics, and vLLM's sleep."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable
from datetime import UTC, datetime, time
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError
from structlog.testing import capture_logs

from loop.engine_process import engine_command, engine_environment
from loop.settings import EngineSettings
from loop.vllm import Replica
from loop.watch.latency import Latency, NoSuchMetric, buckets, quantile
from loop.watch.settings import TruceSettings
from loop.watch.truce import Truce
from tests.fakes.vllm import FakeVllm

FAST = {"poll_seconds": 0.1, "quiet_seconds": 0.5, "min_requests": 3}


def at(hour: int, minute: int = 0) -> datetime:
    return datetime(2026, 1, 1, hour, minute, tzinfo=UTC)


class Heard:
    """What the truce said, in order; None is "go on"."""

    def __init__(self) -> None:
        self.words: list[str | None] = []

    async def __call__(self, broken: str | None) -> None:
        self.words.append(broken)

    async def until(self, there: Callable[[], bool]) -> None:
        async with asyncio.timeout(20):
            while not there():
                await asyncio.sleep(0.02)


@pytest.mark.parametrize(
    ("start", "end", "inside", "outside"),
    [(time(1), time(5), at(1), at(5)), (time(22), time(6), at(23), at(12)), (time(22), time(6), at(5, 59), at(6))],
)
async def test_training_runs_only_in_its_hours(start: time, end: time, inside: datetime, outside: datetime) -> None:
    """Also over midnight; outside it waits from the beginning, and goes on when the hour has come."""
    clock = [outside]
    truce = Truce(TruceSettings(window_from=start, window_to=end, poll_seconds=0.1), (), lambda: clock[0])
    heard = Heard()
    async with truce.kept(heard):
        assert truce.broken is not None
        assert f"outside {start:%H:%M}-{end:%H:%M}" in truce.broken
        waiting = asyncio.create_task(truce.allowed())
        await asyncio.sleep(0.3)
        assert not waiting.done()
        clock[0] = inside
        await asyncio.wait_for(waiting, 10)
    assert heard.words[1:] == [None]


async def test_a_broken_objective_pauses_until_production_has_been_quiet() -> None:
    """Twice in a row above it, then paused; kept for `quiet_seconds`, then on. Measured between looks."""
    async with FakeVllm() as fake:
        fake.first_tokens += [0.03] * 1000
        replica = Replica(fake.url)
        truce = Truce(TruceSettings.model_validate({**FAST, "latency_seconds": 0.2}), (replica,), lambda: at(1))
        heard = Heard()
        slow = True

        async def serve() -> None:
            while True:
                fake.first_tokens += [0.7 if slow else 0.03] * 20
                await asyncio.sleep(0.03)

        serving = asyncio.create_task(serve())
        async with truce.kept(heard):
            await heard.until(lambda: len(heard.words) == 1)
            assert "time_to_first_token_seconds p95 is 0.7" in str(heard.words[0])
            slow = False
            await heard.until(lambda: len(heard.words) == 2)
            assert heard.words[1] is None
        serving.cancel()
        await replica.close()


async def test_few_requests_and_a_replica_that_is_down_say_nothing() -> None:
    """Two slow requests are no objective broken; an engine without the metric costs a line in the log."""
    async with FakeVllm() as fake:
        asked = {**FAST, "latency_seconds": 0.2, "min_requests": 50, "metrics_url": f"{fake.url}/metrics"}
        truce = Truce(TruceSettings.model_validate(asked), (), lambda: at(1))
        heard = Heard()
        async with truce.kept(heard):
            for _ in range(8):
                fake.first_tokens += [3.0, 3.0]
                await asyncio.sleep(0.1)
        assert heard.words == []
        nowhere = TruceSettings.model_validate({**FAST, "latency_seconds": 0.2, "metrics_url": f"{fake.url}/health"})
        with capture_logs() as logs:
            async with Truce(nowhere, (), lambda: at(1)).kept(heard):
                await asyncio.sleep(0.3)
        assert heard.words == []
        assert "no histogram" in logs[0]["reason"]


async def test_replicas_sleep_while_it_trains_and_are_always_woken() -> None:
    """Also when the training fails; one without sleep mode is said, and training goes on."""
    async with FakeVllm() as fake, FakeVllm() as awake:
        awake.faults.no_sleep_mode = True
        replicas = (Replica(fake.url), Replica(awake.url))
        truce = Truce(TruceSettings(sleep=True), replicas, lambda: at(1))
        with capture_logs() as logs, pytest.raises(ZeroDivisionError):
            async with truce.kept(Heard()):
                assert fake.asleep
                raise ZeroDivisionError
        assert not fake.asleep
        assert fake.naps == 1
        (said,) = [line for line in logs if line["event"] == "replica_not_asleep"]
        assert "enable-sleep-mode" in said["hint"]
        for replica in replicas:
            await replica.close()


async def test_without_settings_nothing_is_asked() -> None:
    async with FakeVllm() as fake:
        replica = Replica(fake.url)
        async with Truce(TruceSettings(), (replica,), lambda: at(1)).kept(Heard()):
            await asyncio.sleep(0.1)
        assert fake.naps == 0
        await replica.close()


def test_a_quantile_is_read_as_prometheus_reads_it() -> None:
    """Half of the requests at or below 1 s, the rest below 3 s; more than the last bound is that bound."""
    counts = {1.0: 50.0, 3.0: 100.0, math.inf: 100.0}
    assert quantile(counts, 0.5) == 1.0
    assert quantile(counts, 0.75) == 2.0
    assert quantile({1.0: 0.0, math.inf: 10.0}, 0.5) == 1.0


def test_a_restarted_engine_is_no_latency() -> None:
    """Its counters begin anew: that look says nothing, the next one does."""

    def text(*counts: int) -> str:
        bounds = ("0.1", "1.0", "+Inf")
        rows = [f'm_bucket{{le="{bound}"}} {count}' for bound, count in zip(bounds, counts, strict=True)]
        return "\n".join(["# TYPE m histogram", *rows, ""])

    latency = Latency("m", 0.5, 1)
    seen = [latency.since_last("a", text(*counts)) for counts in ((9, 9, 9), (0, 20, 20), (0, 22, 22))]
    assert seen[:2] == [None, None]
    assert seen[2] == pytest.approx(0.55)
    with pytest.raises(NoSuchMetric):
        buckets(text(1, 1, 1), "other")


@pytest.mark.parametrize(
    "wrong",
    [
        {"window_from": time(1)},
        {"window_to": time(1)},
        {"window_from": time(1), "window_to": time(1)},
        {"memory_share": 2},
    ],
)
def test_half_a_window_is_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        TruceSettings.model_validate(wrong)


def test_a_managed_engine_gets_sleep_mode_and_its_endpoints_only_when_told() -> None:
    """Over HTTP vLLM has it in its development mode only, which opens more."""
    able = EngineSettings(device="cuda", sleep_mode=True)
    assert "--enable-sleep-mode" in engine_command(able, Path("base"), "base", 1)
    assert engine_environment(able)["VLLM_SERVER_DEV_MODE"] == "1"
    plain = EngineSettings(device="cuda")
    assert "--enable-sleep-mode" not in engine_command(plain, Path("base"), "base", 1)
    assert "VLLM_SERVER_DEV_MODE" not in engine_environment(plain)
    with pytest.raises(ValueError, match='needs device = "cuda"'):
        EngineSettings(sleep_mode=True)
