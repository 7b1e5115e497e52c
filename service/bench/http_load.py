"""A light load of POST requests over kept connections: `python -m service.bench.http_load SPEC.json`.

Each connection sends its next request when the last one was answered. Prints what was answered and writes the ids of
the 202s, one a line. Its own parsing is the least that these answers need: it shares two cores with what it measures.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import cast

import uvloop


@dataclass(frozen=True)
class Spec:
    port: int
    path: str
    key: str
    bodies: list[str]
    connections: int
    seconds: float
    ids_file: str


@dataclass
class Load:
    """`deadline`: after it no request is sent, and those in flight are waited for."""

    requests: Iterator[bytes]
    deadline: float
    ids: list[bytes] = field(default_factory=list)
    other_answers: int = 0


class Connection(asyncio.Protocol):
    def __init__(self, load: Load) -> None:
        self.load = load
        self.done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._buffer = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's is none by its class
        self._next()

    def data_received(self, data: bytes) -> None:
        self._buffer += data
        head, found, body = self._buffer.partition(b"\r\n\r\n")
        if not found:
            return
        length = int(head.lower().partition(b"content-length:")[2].split(b"\r\n", 1)[0])
        if len(body) < length:
            return
        self._buffer = b""
        if head.startswith(b"HTTP/1.1 202"):
            self.load.ids.append(body.partition(b'"id":"')[2].partition(b'"')[0])
        else:
            self.load.other_answers += 1
        self._next()

    def connection_lost(self, error: Exception | None) -> None:
        if not self.done.done():
            self.done.set_exception(ConnectionError(f"the server closed the connection: {error}"))

    def _next(self) -> None:
        if time.perf_counter() < self.load.deadline:
            self._transport.write(next(self.load.requests))
        else:
            self.done.set_result(None)
            self._transport.close()


async def run(spec: Spec) -> dict[str, float]:
    head = f"POST {spec.path} HTTP/1.1\r\nHost: bench\r\nAuthorization: Bearer {spec.key}\r\n"
    head += "Content-Type: application/json\r\n"
    requests = [f"{head}Content-Length: {len(body.encode())}\r\n\r\n{body}".encode() for body in spec.bodies]
    loop = asyncio.get_running_loop()
    started = time.perf_counter()
    load = Load(itertools.cycle(requests), started + spec.seconds)
    opened = [loop.create_connection(lambda: Connection(load), "127.0.0.1", spec.port) for _ in range(spec.connections)]
    connections = await asyncio.gather(*opened)
    await asyncio.gather(*(protocol.done for _, protocol in connections))
    seconds = time.perf_counter() - started
    Path(spec.ids_file).write_bytes(b"".join(one + b"\n" for one in load.ids))
    return {"acknowledged": len(load.ids), "other": load.other_answers, "seconds": seconds}


def spec_as_json(spec: Spec) -> str:
    return json.dumps(asdict(spec))


if __name__ == "__main__":
    print(json.dumps(uvloop.run(run(Spec(**json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")))))))
