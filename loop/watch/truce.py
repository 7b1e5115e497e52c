"""A truce between the training and the engines that serve on the same GPU: hours, memory, sleep, an objective.

Production comes first: outside the hours, or while its latency objective is broken, the trainer is paused (it keeps
its memory) or ended after a checkpoint (it gives it back), and goes on when production has been quiet for a while.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from datetime import datetime
from typing import TYPE_CHECKING, Self

import httpx
import structlog

from labeling.database import now
from labeling.errors import NightschoolError
from loop.vllm import Replica
from loop.watch.latency import Latency, NoSuchMetric
from loop.watch.settings import TruceSettings

if TYPE_CHECKING:
    from loop.stage import StageContext

log = structlog.get_logger()
BREAKS = 2  # looks in a row; one slow request is no broken objective
METRICS_SECONDS = 5.0

Says = Callable[[str | None], Awaitable[None]]


class Truce:
    """`broken` is why production needs the machine now, None while it does not."""

    def __init__(self, settings: TruceSettings, replicas: tuple[Replica, ...], clock: Callable[[], datetime]) -> None:
        self._settings, self._replicas, self._clock = settings, replicas, clock
        urls = (settings.metrics_url,) if settings.metrics_url else tuple(f"{one.url}/metrics" for one in replicas)
        self._latency = Latency(settings.metric, settings.quantile, settings.min_requests)
        self._urls = urls
        self._client: httpx.AsyncClient | None = None  # made when it is needed: that takes tens of milliseconds
        self._breaks = 0
        self._kept_since: float | None = None
        self.broken: str | None = None
        self._free = asyncio.Event()
        self._free.set()

    @classmethod
    def of(cls, context: StageContext) -> Self:
        zone = context.project.schedule.zone
        return cls(context.project.trainer.truce, context.clients.replicas, lambda: now().astimezone(zone))

    @property
    def on(self) -> bool:
        return self._settings.window_from is not None or self._settings.latency_seconds is not None

    @property
    def gives_memory_back(self) -> bool:
        return self._settings.when_broken == "stop"

    async def allowed(self) -> None:
        """Waits until training may run."""
        await self._free.wait()

    @asynccontextmanager
    async def kept(self, says: Says) -> AsyncIterator[None]:
        """While the block runs. Replicas that were put to sleep are woken whatever happens."""
        if self.on:
            await self._look(says)
        looking = asyncio.create_task(self._run(says), name="truce") if self.on else None
        try:
            if self._settings.sleep:
                await self._sleep()
            yield
        finally:
            if looking is not None:
                looking.cancel()
                await asyncio.gather(looking, return_exceptions=True)
            if self._client is not None:
                await self._client.aclose()
            if self._settings.sleep:
                await self._wake()

    async def _run(self, says: Says) -> None:
        while True:
            await asyncio.sleep(self._settings.poll_seconds)
            await self._look(says)

    async def _look(self, says: Says) -> None:
        why = self._outside() or await self._too_slow()
        if why is not None and self.broken is None:
            self.broken = why
            self._free.clear()
            log.warning("truce_broken", reason=why)
            await says(why)
        elif why is None and self.broken is not None:
            self.broken = None
            log.info("truce_kept_again")
            await says(None)
            self._free.set()

    def _outside(self) -> str | None:
        start, end = self._settings.window_from, self._settings.window_to
        if start is None or end is None:
            return None
        at = self._clock().time().replace(tzinfo=None)
        inside = start <= at < end if start < end else at >= start or at < end
        return None if inside else f"{at:%H:%M} is outside {start:%H:%M}-{end:%H:%M}"

    async def _too_slow(self) -> str | None:
        """The objective, with patience both ways: broken twice in a row, and kept for a while."""
        limit = self._settings.latency_seconds
        if limit is None:
            return None
        seconds = await self._measured()
        if seconds is not None and seconds > limit:
            self._breaks += 1
            self._kept_since = None
            told = f"{self._settings.metric} p{100 * self._settings.quantile:g} is {seconds:.2f} s, above {limit:g} s"
            return told if self._breaks >= BREAKS or self.broken else None
        self._breaks = 0
        if self.broken is None:
            return None
        self._kept_since = self._kept_since or time.monotonic()
        return None if time.monotonic() - self._kept_since >= self._settings.quiet_seconds else self.broken

    async def _measured(self) -> float | None:
        """Of the requests since the last look, the slowest replica's; None where there were too few."""
        if self._client is None:
            fresh = httpx.Limits(max_keepalive_connections=0)  # between two looks an engine may have been restarted
            self._client = httpx.AsyncClient(timeout=METRICS_SECONDS, trust_env=False, limits=fresh)
        found = [await self._of(self._client, url) for url in self._urls]
        return max((seconds for seconds in found if seconds is not None), default=None)

    async def _of(self, client: httpx.AsyncClient, url: str) -> float | None:
        try:
            answer = await client.get(url)
            answer.raise_for_status()
            return self._latency.since_last(url, answer.text)
        except (httpx.HTTPError, NoSuchMetric) as error:
            log.warning("latency_not_measured", url=url, reason=str(error))
            return None

    async def _sleep(self) -> None:
        for replica in self._replicas:
            try:
                await replica.sleep()
            except NightschoolError as error:
                log.warning("replica_not_asleep", replica=replica.url, reason=str(error), hint=error.hint)

    async def _wake(self) -> None:
        for replica in self._replicas:
            try:
                await replica.wake_up()
            except NightschoolError as error:
                log.error("replica_not_awake", replica=replica.url, reason=str(error), hint=error.hint)
