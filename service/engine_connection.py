"""HTTP/1.1 to one engine over connections that are kept: what the gateway needs of a client, and nothing else.

The answer's bytes pass as they are: no redirects, cookies, compression or proxies. aiohttp's client does all that, and
takes three times as long for a request. `service.upstream` is the only caller.
"""

from __future__ import annotations

import asyncio
import ssl
from collections import deque
from dataclasses import dataclass
from typing import cast
from urllib.parse import urlsplit

import httptools

CONNECT_SECONDS = 5.0
KEEP_ALIVE_SECONDS = 2.0  # vLLM closes idle connections after 5: we must be the first to let go
MOST_HEADER_BYTES = 64 * 1024
MOST_WAITING_BYTES = 256 * 1024  # of a stream whose client reads slowly: then the engine is not read either
WITHOUT_BODY = frozenset({204, 304})


class NotConnected(Exception):
    """Nothing was sent."""


class BrokeOff(Exception):
    """The engine closed the connection, answered with something else than HTTP, or was silent for too long."""


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


class Answer:
    """One answer, whose body is read whole or piece by piece. Whoever has it closes it."""

    def __init__(self, connection: Connection) -> None:
        self.status = 0  # until its headers are there
        self.headers: dict[bytes, bytes] = {}  # names in lower case
        self.complete = False
        self._connection = connection
        self._parts: list[bytes] = []
        self._waiting_bytes = 0
        self._whole = False
        self._error: BrokeOff | None = None
        self._waiter: asyncio.Future[None] | None = None

    async def begun(self) -> None:
        while not self.status:
            await self._wait()

    async def read(self) -> bytes:
        self._whole = True
        self._connection.go_on(self)
        while not self.complete:
            await self._wait()
        return self._take()

    async def piece(self) -> bytes:
        """What has come since the last look; b"" at the end. An error comes after the last bytes that came."""
        while not self._parts and not self.complete:
            await self._wait()
        return self._take()

    def close(self) -> None:
        """Cuts the connection where the answer is not complete: the engine stops generating."""
        if not self.complete:
            self._connection.cut()

    def feed(self, part: bytes) -> bool:
        """Whether there is room for more."""
        self._parts.append(part)
        self._waiting_bytes += len(part)
        if not self._whole:
            self.wake()
        return self._whole or self._waiting_bytes < MOST_WAITING_BYTES

    def finish(self) -> None:
        self.complete = True
        self.wake()

    def fail(self, reason: str) -> None:
        if not self.complete and self._error is None:
            self._error = BrokeOff(reason)
            self.wake()

    def wake(self) -> None:
        waiter = self._waiter
        if waiter is not None and not waiter.done():
            waiter.set_result(None)

    async def _wait(self) -> None:
        if self._error is not None:
            raise self._error
        self._waiter = asyncio.get_running_loop().create_future()
        try:
            await self._waiter
        finally:
            self._waiter = None

    def _take(self) -> bytes:
        parts = self._parts
        taken = parts[0] if len(parts) == 1 else b"".join(parts)
        parts.clear()
        if self._waiting_bytes >= MOST_WAITING_BYTES:
            self._connection.go_on(self)
        self._waiting_bytes = 0
        return taken


class Connection(asyncio.Protocol):
    """One request at a time. httptools calls the `on_` methods."""

    def __init__(self, pool: Pool) -> None:
        self._pool = pool
        self._loop = asyncio.get_running_loop()
        self._parser = httptools.HttpResponseParser(self)
        self._answer: Answer | None = None
        self._headers: dict[bytes, bytes] = {}
        self._header_bytes = 0
        self._until_end = False  # neither length nor chunks: the body ends with the connection
        self._paused = False
        self._heard_at = 0.0
        self._timer: asyncio.TimerHandle | None = None
        self.idle_since = 0.0
        self.usable = True

    def ask(self, request: bytes) -> Answer:
        self._answer = answer = Answer(self)
        self._heard_at = self._loop.time()
        if self._timer is None:
            self._timer = self._loop.call_later(self._pool.read_seconds, self._look)
        self._transport.write(request)
        return answer

    def go_on(self, answer: Answer) -> None:
        if self._paused and answer is self._answer:
            self._paused = False
            self._heard_at = self._loop.time()
            self._transport.resume_reading()

    def cut(self) -> None:
        self.usable = False
        self._transport.abort()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's is no subclass

    def data_received(self, data: bytes) -> None:
        self._heard_at = self._loop.time()
        if self._answer is None:  # nothing was asked
            self.cut()
            return
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError as error:
            self._fail(f"no HTTP: {error}")
        except httptools.HttpParserUpgrade:
            self._fail("it wants another protocol")

    def connection_lost(self, error: Exception | None) -> None:
        self.usable = False
        self._pool.forget(self)
        if self._timer is not None:
            self._timer.cancel()
        if self._until_end and error is None and self._answer is not None:
            self._answer.finish()
        elif self._answer is not None:
            self._answer.fail(str(error) if error else "the connection was closed")
        self._answer = None

    def on_message_begin(self) -> None:
        if self._answer is None:  # a second answer to one request: whose it is, nobody knows
            self.cut()
        self._headers, self._header_bytes = {}, 0

    def on_header(self, name: bytes, value: bytes) -> None:
        self._header_bytes += len(name) + len(value)
        if self._header_bytes <= MOST_HEADER_BYTES:
            self._headers[name.lower()] = value

    def on_headers_complete(self) -> None:
        status, answer = self._parser.get_status_code(), self._answer
        if answer is None or status < 200:  # a word in between, "100 Continue"
            return
        if self._header_bytes > MOST_HEADER_BYTES:
            self._fail(f"more than {MOST_HEADER_BYTES} bytes of headers")
            return
        framed = b"content-length" in self._headers or b"transfer-encoding" in self._headers
        self._until_end = not framed and status not in WITHOUT_BODY
        answer.headers, answer.status = self._headers, status
        answer.wake()

    def on_body(self, part: bytes) -> None:
        answer = self._answer
        if answer is not None and not answer.feed(part) and not self._paused:
            self._paused = True
            self._transport.pause_reading()

    def on_message_complete(self) -> None:
        answer = self._answer
        if answer is None or not answer.status:
            return
        self._answer = None
        answer.finish()
        if self._paused:
            self._paused = False
            self._transport.resume_reading()
        if self.usable and self._parser.should_keep_alive():
            self._pool.put_back(self)
        else:
            self.cut()

    def _fail(self, reason: str) -> None:
        if self._answer is not None:
            self._answer.fail(reason)
            self._answer = None
        self.cut()

    def _look(self) -> None:
        """One timer for all requests of a connection: most never see it."""
        self._timer = None
        if self._answer is None or not self.usable:
            return
        if self._paused:
            self._heard_at = self._loop.time()
        silent = self._loop.time() - self._heard_at
        if silent >= self._pool.read_seconds:
            self._fail(f"nothing came for {self._pool.read_seconds:g} seconds")
        else:
            self._timer = self._loop.call_later(self._pool.read_seconds - silent, self._look)


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
