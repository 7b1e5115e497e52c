"""Asks one of the replicas: the least busy first, the next one where a connection is refused or the name is missing."""

from __future__ import annotations

import structlog

from labeling.errors import Unavailable
from service.alias_table import AliasTable, Flight, Upstream
from service.engine_connection import Answer, BrokeOff
from service.engine_pool import NotConnected, Pool
from service.metrics import Metrics

log = structlog.get_logger(__name__)


class EngineUnreachable(Unavailable):
    code = "engine_unreachable"
    default_hint = "Try again shortly; GET /ready shows which replica is down."


class EngineBrokeOff(Unavailable):
    code = "engine_broke_off"
    default_hint = "Try again; the replica's log tells why it ended the answer."


class Replicas:
    def __init__(self, aliases: AliasTable, metrics: Metrics, read_timeout_seconds: float) -> None:
        self._aliases = aliases
        self._metrics = metrics
        self._read_timeout_seconds = read_timeout_seconds
        self._pools: dict[Upstream, Pool] = {}

    async def close(self) -> None:
        for pool in self._pools.values():
            pool.close()

    async def ask(self, flight: Flight, path: str, body: bytes, headers: bytes) -> Answer:
        """The caller closes it. A replica without the adapter (restarted a moment ago) is passed over."""
        reason = "no replica is configured"
        for upstream in self._aliases.replicas_for(flight.route.project):
            flight.via(upstream)
            try:
                answer = await self._pool(upstream).post(path, headers, body)
                lacks = answer.status == 404 and flight.route.is_alias
                if lacks:
                    try:
                        await answer.read()
                    finally:
                        answer.close()
            except NotConnected as error:
                self._aliases.refused(upstream)
                self.failed(upstream, "refused", error)
                reason = "no replica accepts connections"
                continue
            except BrokeOff as error:
                # The engine may have begun, or died of this very request: the next replica must not have it too.
                self.failed(upstream, "broke_off", error)
                raise EngineBrokeOff("the engine ended the request without an answer") from error
            if not lacks:
                return answer
            self.failed(upstream, "not_loaded", None)
            reason = f"no replica has loaded {flight.route.served!r}"
        raise EngineUnreachable(f"{reason}: {flight.route.requested!r} is not served at the moment")

    async def check(self, upstream: Upstream) -> str:
        """For /ready."""
        try:
            answer = await self._pool(upstream).get("/health")
            try:
                await answer.read()
            finally:
                answer.close()
        except (NotConnected, BrokeOff) as error:
            raise EngineUnreachable(f"{upstream.url} cannot be reached: {error}") from error
        if answer.status != 200:
            raise EngineUnreachable(f"{upstream.url}/health answers {answer.status}")
        return "answers"

    def failed(self, upstream: Upstream, kind: str, error: Exception | None) -> None:
        self._metrics.upstream_errors.labels(upstream.url, kind).inc()
        log.warning("replica_failed", replica=upstream.url, kind=kind, error=str(error) if error else None)

    def _pool(self, upstream: Upstream) -> Pool:
        pool = self._pools.get(upstream)
        if pool is None:
            pool = self._pools[upstream] = Pool(upstream.url, self._read_timeout_seconds, upstream.api_key)
        return pool
