"""Connections to one engine, kept open between requests: what the gateway needs of an HTTP client, and nothing else.

`service.upstream` is the only caller.
"""

from __future__ import annotations

import asyncio
import ssl
from collections import deque
from dataclasses import dataclass
from urllib.parse import urlsplit

from service.engine_connection import Answer, Connection

CONNECT_SECONDS = 5.0
KEEP_ALIVE_SECONDS = 2.0  # vLLM closes idle connections after 5: we must be the first to let go


class NotConnected(Exception):
    """Nothing was sent."""


@dataclass(frozen=True, slots=True)
class Origin:
    """Where an engine listens, and what stands before every path."""

    host: str
    port: int
    tls: bool
    prefix: str
    netloc: str

    @classmethod
    def of(cls, url: str) -> Origin:
        parts = urlsplit(url)
        tls = parts.scheme == "https"
        netloc = parts.netloc.rpartition("@")[2]
        return cls(parts.hostname or "", parts.port or (443 if tls else 80), tls, parts.path.rstrip("/"), netloc)


class Pool:
    """Connections to one engine: as many as there are requests; the one used last goes out first."""

    def __init__(self, url: str, read_seconds: float, key: str | None = None) -> None:
        self.read_seconds = read_seconds
        origin = self._origin = Origin.of(url)
        self._tls = ssl.create_default_context() if origin.tls else None
        authorization = f"authorization: Bearer {key}\r\n" if key else ""
        self._head = (f"host: {origin.netloc}\r\naccept-encoding: identity\r\n{authorization}").encode("latin-1")
        self._idle: deque[Connection] = deque()
        self._open: set[Connection] = set()
        self._sweeper: asyncio.TimerHandle | None = None

    async def post(self, path: str, headers: bytes, body: bytes) -> Answer:
        """`headers` are whole lines. Raises NotConnected or BrokeOff; returns when the answer's headers are there."""
        length = b"content-length: %d\r\n\r\n" % len(body)
        return await self._ask(b"POST " + self._target(path) + self._head + headers + length + body)

    async def get(self, path: str) -> Answer:
        return await self._ask(b"GET " + self._target(path) + self._head + b"\r\n")

    def put_back(self, connection: Connection) -> None:
        connection.idle_since = asyncio.get_running_loop().time()
        self._idle.append(connection)
        if self._sweeper is None:
            self._sweeper = asyncio.get_running_loop().call_later(KEEP_ALIVE_SECONDS, self._sweep)

    def close(self) -> None:
        if self._sweeper is not None:
            self._sweeper.cancel()
        for connection in list(self._open):
            connection.cut()

    def forget(self, connection: Connection) -> None:
        self._open.discard(connection)

    def _target(self, path: str) -> bytes:
        return f"{self._origin.prefix}{path} HTTP/1.1\r\n".encode("latin-1")

    async def _ask(self, request: bytes) -> Answer:
        connection = self._kept() or await self._connected()
        answer = connection.ask(request)
        try:
            await answer.begun()
        except BaseException:
            answer.close()
            raise
        return answer

    def _kept(self) -> Connection | None:
        oldest = asyncio.get_running_loop().time() - KEEP_ALIVE_SECONDS
        while self._idle:
            connection = self._idle.pop()
            if connection.usable and connection.idle_since > oldest:
                return connection
            connection.cut()
        return None

    async def _connected(self) -> Connection:
        loop, origin = asyncio.get_running_loop(), self._origin
        try:
            async with asyncio.timeout(CONNECT_SECONDS):
                _, connection = await loop.create_connection(
                    lambda: Connection(self), origin.host, origin.port, ssl=self._tls
                )
        except (OSError, TimeoutError) as error:  # an SSLError is an OSError too
            raise NotConnected(str(error) or f"no connection within {CONNECT_SECONDS:g} seconds") from error
        self._open.add(connection)
        return connection

    def _sweep(self) -> None:
        self._sweeper = None
        now = asyncio.get_running_loop().time()
        while self._idle and (not self._idle[0].usable or self._idle[0].idle_since <= now - KEEP_ALIVE_SECONDS):
            self._idle.popleft().cut()
        if self._idle:
            due = self._idle[0].idle_since + KEEP_ALIVE_SECONDS - now
            self._sweeper = asyncio.get_running_loop().call_later(max(due, 0.05), self._sweep)
