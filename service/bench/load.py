"""A load generator: a fixed number of connections, each sending its next request when it has the answer.

A process of its own, `python -m service.bench.load`, with a `Load` as JSON on stdin and a `Seen` on stdout; asyncio and
httptools only, so that every server is measured by the same small client.
"""

from __future__ import annotations

import asyncio
import sys
import time
from typing import cast
from urllib.parse import urlsplit

import httptools
import msgspec
import uvloop

CONNECT_SECONDS = 10.0


class Load(msgspec.Struct, frozen=True):
    """`seconds` of requests; or, where that is 0, one request on each connection, until all are answered."""

    url: str
    body: str
    connections: int
    seconds: float = 0.0
    key: str = ""


class Seen(msgspec.Struct):
    seconds: float = 0.0
    events: int = 0  # server-sent ones
    failed: int = 0
    statuses: dict[int, int] = {}
    latencies_ms: list[float] = []  # of requests answered with 200

    @property
    def answered(self) -> int:
        return len(self.latencies_ms)

    @property
    def per_second(self) -> float:
        return self.answered / self.seconds if self.seconds else 0.0

    @property
    def events_per_second(self) -> float:
        return self.events / self.seconds if self.seconds else 0.0

    def percentile_ms(self, share: float) -> float:
        """The nearest rank; nan where nothing was answered."""
        ordered = sorted(self.latencies_ms)
        return ordered[min(int(share * len(ordered)), len(ordered) - 1)] if ordered else float("nan")


def request_of(load: Load) -> bytes:
    target = urlsplit(load.url)
    body = load.body.encode()
    lines = [
        f"POST {target.path} HTTP/1.1",
        f"host: {target.netloc}",
        "accept: application/json",
        "content-type: application/json",
        f"content-length: {len(body)}",
        *([f"authorization: Bearer {load.key}"] if load.key else []),
    ]
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + body


class Connection(asyncio.Protocol):
    def __init__(self, request: bytes, seen: Seen, until: float) -> None:
        self.done = asyncio.get_running_loop().create_future()
        self._request, self._seen, self._until = request, seen, until
        self._parser = httptools.HttpResponseParser(self)
        self._sent_at = 0.0
        self._newline = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's is no subclass
        self._send()

    def data_received(self, data: bytes) -> None:
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError:
            self._transport.abort()

    def connection_lost(self, _: Exception | None) -> None:
        if not self.done.done():
            self._seen.failed += 1
            self.done.set_result(None)

    def on_body(self, part: bytes) -> None:
        # An event ends with an empty line, which may be cut in two.
        self._seen.events += part.count(b"\n\n") + (self._newline and part.startswith(b"\n"))
        self._newline = part.endswith(b"\n") and not part.endswith(b"\n\n")

    def on_message_complete(self) -> None:
        instant = time.perf_counter()
        status = self._parser.get_status_code()
        if self._until and instant > self._until:
            self._end()
            return
        self._seen.statuses[status] = self._seen.statuses.get(status, 0) + 1
        if status == 200:
            self._seen.latencies_ms.append((instant - self._sent_at) * 1000)
        if not self._until:
            self._end()
        elif self._parser.should_keep_alive():
            self._send()
        else:
            self._transport.close()

    def _send(self) -> None:
        self._sent_at = time.perf_counter()
        self._transport.write(self._request)

    def _end(self) -> None:
        if not self.done.done():
            self.done.set_result(None)
        self._transport.close()


async def drive(load: Load) -> Seen:
    loop = asyncio.get_running_loop()
    target = urlsplit(load.url)
    seen, request = Seen(), request_of(load)
    started = time.perf_counter()
    until = started + load.seconds if load.seconds else 0.0

    async def connect() -> Connection:
        async with asyncio.timeout(CONNECT_SECONDS):
            _, protocol = await loop.create_connection(
                lambda: Connection(request, seen, until), target.hostname or "", target.port or 80
            )
        return protocol

    connections = await asyncio.gather(*(connect() for _ in range(load.connections)))
    await asyncio.gather(*(connection.done for connection in connections))
    seen.seconds = load.seconds or time.perf_counter() - started
    return seen


if __name__ == "__main__":
    found = uvloop.run(drive(msgspec.json.decode(sys.stdin.buffer.read(), type=Load)))
    sys.stdout.buffer.write(msgspec.json.encode(found))
