"""Asks one of the replicas: the least busy first, the next one where a connection is refused or the name is missing."""

from __future__ import annotations

import aiohttp
import structlog

from labeling.errors import Unavailable
from service.alias_table import AliasTable, Flight, Upstream
from service.metrics import Metrics

log = structlog.get_logger(__name__)
CONNECT_SECONDS = 5.0
KEEP_ALIVE_SECONDS = 2.0  # vLLM closes idle connections after 5: we must be the first to let go


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
        self._timeout = aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_SECONDS, sock_read=read_timeout_seconds)
        self._client: aiohttp.ClientSession | None = None

    async def open(self) -> None:
        self._client = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=KEEP_ALIVE_SECONDS),
            timeout=self._timeout,
            auto_decompress=False,
            cookie_jar=aiohttp.DummyCookieJar(),
        )

    async def close(self) -> None:
        if self._client is not None:
            await self._client.close()

    async def ask(self, flight: Flight, path: str, body: bytes, headers: dict[str, str]) -> aiohttp.ClientResponse:
        """The caller closes it. A replica without the adapter (restarted a moment ago) is passed over."""
        reason = "no replica is configured"
        for upstream in self._aliases.replicas_for(flight.route.project):
            flight.via(upstream)
            try:
                response = await self._post(upstream, path, body, headers)
            except (aiohttp.ClientConnectorError, aiohttp.ConnectionTimeoutError) as error:  # nothing was sent
                self._aliases.refused(upstream)
                self.failed(upstream, "refused", error)
                reason = "no replica accepts connections"
                continue
            except (aiohttp.ClientError, TimeoutError, OSError) as error:
                # The engine may have begun, or died of this very request: the next replica must not have it too.
                self.failed(upstream, "broke_off", error)
                raise EngineBrokeOff("the engine ended the request without an answer") from error
            if response.status == 404 and flight.route.is_alias:
                await response.read()
                response.close()
                self.failed(upstream, "not_loaded", None)
                reason = f"no replica has loaded {flight.route.served!r}"
                continue
            return response
        raise EngineUnreachable(f"{reason}: {flight.route.requested!r} is not served at the moment")

    async def check(self, upstream: Upstream) -> str:
        """For /ready."""
        assert self._client is not None
        try:
            async with self._client.get(f"{upstream.url}/health") as response:
                if response.status == 200:
                    return "answers"
                raise EngineUnreachable(f"{upstream.url}/health answers {response.status}")
        except (aiohttp.ClientError, OSError) as error:
            raise EngineUnreachable(f"{upstream.url} cannot be reached: {error}") from error

    def failed(self, upstream: Upstream, kind: str, error: Exception | None) -> None:
        self._metrics.upstream_errors.labels(upstream.url, kind).inc()
        log.warning("replica_failed", replica=upstream.url, kind=kind, error=str(error) if error else None)

    async def _post(
        self, upstream: Upstream, path: str, body: bytes, headers: dict[str, str]
    ) -> aiohttp.ClientResponse:
        assert self._client is not None, "open() comes first"
        key = {"Authorization": f"Bearer {upstream.api_key}"} if upstream.api_key else {}
        return await self._client.post(upstream.url + path, data=body, headers={**headers, **key})
