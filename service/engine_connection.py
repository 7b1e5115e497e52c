"""HTTP/1.1 over one connection to an engine: one request at a time, and its answer whole or piece by piece.

The answer's bytes pass as they are: no redirects, cookies, compression or proxies. `service.engine_pool` keeps the
connections.
"""

from __future__ import annotations

import asyncio
from typing import Protocol, cast

import httptools

MOST_HEADER_BYTES = 64 * 1024
MOST_WAITING_BYTES = 256 * 1024  # of a stream whose client reads slowly: then the engine is not read either
WITHOUT_BODY = frozenset({204, 304})


class BrokeOff(Exception):
    """The engine closed the connection, answered with something else than HTTP, or was silent for too long."""


class Keeper(Protocol):
    """Where a connection goes when its answer is complete, and whom it tells that it is gone."""

    read_seconds: float

    def put_back(self, connection: Connection) -> None: ...

    def forget(self, connection: Connection) -> None: ...


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

    def __init__(self, keeper: Keeper) -> None:
        self._keeper = keeper
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
            self._timer = self._loop.call_later(self._keeper.read_seconds, self._look)
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
        self._keeper.forget(self)
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
            self._keeper.put_back(self)
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
        if silent >= self._keeper.read_seconds:
            self._fail(f"nothing came for {self._keeper.read_seconds:g} seconds")
        else:
            self._timer = self._loop.call_later(self._keeper.read_seconds - silent, self._look)
