"""Clients that hold connections, memory or an engine for nothing: slow, endless, too many, not reading, half gone."""

from __future__ import annotations

import asyncio
import resource
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import msgspec
import pytest

from labeling.database import Database
from labeling.tables import Feedback
from service import http_guard
from service.settings import HttpSettings
from tests.fakes.vllm import FakeVllm
from tests.running import BASE, PROJECT, Service, count, eventually, service, settings_for

CHAT = "/v1/chat/completions"


@asynccontextmanager
async def running(folder: Path, vllm: FakeVllm, **http: Any) -> AsyncIterator[Service]:
    database = Database(f"sqlite+aiosqlite:///{folder / 'n.db'}")
    await database.create_tables()
    async with service(database, settings_for([vllm.url], **http)) as found:
        yield found
    await database.close()


@pytest.fixture
async def vllm() -> AsyncIterator[FakeVllm]:
    async with FakeVllm(base=BASE) as fake:
        yield fake


class Client:
    """A socket that sends exactly what it is told."""

    def __init__(self, at: Service, key: str) -> None:
        self.at, self.key = at, key

    async def __aenter__(self) -> Client:
        port = int(self.at.url.rpartition(":")[2])
        plain = socket.socket()
        plain.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        plain.setblocking(False)
        await asyncio.get_running_loop().sock_connect(plain, ("127.0.0.1", port))
        self.reader, self.writer = await asyncio.open_connection(sock=plain, limit=2**12)
        return self

    async def __aexit__(self, *_: object) -> None:
        self.writer.transport.abort()

    def head(self, path: str = CHAT, length: int | None = None, **headers: str) -> bytes:
        size = f"content-length: {length}" if length is not None else "transfer-encoding: chunked"
        more = "".join(f"{name.replace('_', '-')}: {value}\r\n" for name, value in headers.items())
        return (f"POST {path} HTTP/1.1\r\nhost: x\r\nauthorization: Bearer {self.key}\r\n{size}\r\n{more}\r\n").encode()

    def asks(self, **more: Any) -> bytes:
        body = msgspec.json.encode({"model": PROJECT, "messages": [{"role": "user", "content": "hello"}], **more})
        return self.head(length=len(body)) + body

    async def send(self, data: bytes) -> None:
        self.writer.write(data)
        await self.writer.drain()

    async def to_the_end(self) -> bytes:
        """All that comes until the server closes."""
        got = b""
        try:
            while data := await self.reader.read(65_536):
                got += data
        except ConnectionError:
            pass
        return got


async def test_requests_that_do_not_come_are_not_waited_for(tmp_path: Path, vllm: FakeVllm) -> None:
    """Nothing at all, half a head, a body that drips or never ends, empty lines after an answer."""
    async with running(tmp_path, vllm, request_timeout_seconds=0.3) as at:
        key = await at.key("inference")
        head = Client(at, key).head(length=50)
        beginnings = (b"", head[:20], head, head + b'{"model":', Client(at, key).head() + b"5\r\nhello\r\n")
        for beginning in beginnings:
            async with Client(at, key) as client:
                await client.send(beginning)
                async with asyncio.timeout(5):
                    assert await client.to_the_end() == b"", beginning
        async with Client(at, key) as client:
            await client.send(client.asks())
            await client.reader.readuntil(b"\r\n\r\n")
            await client.send(b"\r\n")
            async with asyncio.timeout(5):
                await client.to_the_end()
        await eventually(lambda: at.state.aliases.in_flight(BASE) == 0)
        assert len(vllm.seen) == 1


async def test_a_slow_line_is_not_a_slow_client(tmp_path: Path, vllm: FakeVllm) -> None:
    """A body that goes on coming may take longer than the time that a request has."""
    async with (
        running(tmp_path, vllm, request_timeout_seconds=0.2) as at,
        Client(at, await at.key("inference")) as client,
    ):
        whole = client.asks(padding="x" * 2000)
        begun = whole.index(b"\r\n\r\n") + 4
        await client.send(whole[:begun])
        for start in range(begun, len(whole), 150):
            await client.send(whole[start : start + 150])
            await asyncio.sleep(0.05)
        assert (await client.reader.readuntil(b"\r\n")).startswith(b"HTTP/1.1 200")


async def test_headers_have_a_size(tmp_path: Path, vllm: FakeVllm) -> None:
    """431 for one header without end, for thousands of small ones, and for a path without end; large ones pass."""
    async with running(tmp_path, vllm) as at:
        key = await at.key("inference")
        many = b"".join(b"x-%d: y\r\n" % number for number in range(20_000))
        endless = (b"x: " + b"a" * 300_000, many, b"GET /" + b"a" * 300_000)
        for headers in endless:
            async with Client(at, key) as client:
                start = b"" if headers.startswith(b"GET") else b"POST /v1/chat/completions HTTP/1.1\r\n"
                client.writer.write(start + headers)
                async with asyncio.timeout(5):
                    got = await client.to_the_end()
                assert not got or got.startswith(b"HTTP/1.1 431"), headers[:20]
        async with Client(at, key) as client:
            asked = client.asks().replace(b"\r\n\r\n", b"\r\nx: " + b"a" * 30_000 + b"\r\n\r\n", 1)
            await client.send(asked)
            assert (await client.reader.readuntil(b"\r\n")).startswith(b"HTTP/1.1 200")


async def test_connections_are_counted(tmp_path: Path, vllm: FakeVllm) -> None:
    """Those that are there go on being served; there is room again when one goes."""
    async with running(tmp_path, vllm, max_connections=3) as at:
        key = await at.key("inference")
        async with Client(at, key) as first, Client(at, key), Client(at, key) as third:
            await asyncio.sleep(0.05)
            async with Client(at, key) as fourth:
                assert await fourth.to_the_end() == b""
            await first.send(first.asks())
            assert (await first.reader.readuntil(b"\r\n")).startswith(b"HTTP/1.1 200")
            third.writer.transport.abort()
            await asyncio.sleep(0.05)
            async with Client(at, key) as fifth:
                await fifth.send(fifth.asks())
                assert (await fifth.reader.readuntil(b"\r\n")).startswith(b"HTTP/1.1 200")


async def test_who_reads_nothing_holds_no_engine(tmp_path: Path, vllm: FakeVllm) -> None:
    """A stream is taken from the engine as fast as the client takes it, and is cut when the client takes nothing."""
    vllm.answer = lambda _model, _prompt: " ".join(["x" * 4000] * 8000)
    async with running(tmp_path, vllm, stalled_client_seconds=0.5) as at:
        async with Client(at, await at.key("inference")) as client:
            await client.send(client.asks(stream=True, max_tokens=8000))
            await eventually(lambda: vllm.running == 1)
            await eventually(lambda: vllm.aborted == 1, seconds=20)
            assert not vllm.running
        await eventually(lambda: at.state.aliases.in_flight(BASE) == 0)


async def test_half_a_connection_leaves_nothing_behind(tmp_path: Path, vllm: FakeVllm) -> None:
    """A client that closes its sending side counts as gone."""
    vllm.faults.slow_seconds = 30
    async with running(tmp_path, vllm) as at:
        async with Client(at, await at.key("inference")) as client:
            await client.send(client.asks())
            await eventually(lambda: vllm.running == 1)
            client.writer.write_eof()
            await eventually(lambda: vllm.aborted == 1 and not vllm.running)
        await eventually(lambda: at.state.aliases.in_flight(BASE) == 0)


async def test_a_body_cut_short_is_no_body(tmp_path: Path, vllm: FakeVllm) -> None:
    """Neither as a completion nor as feedback, also where what came is whole JSON, or whole lines; and an
    Idempotency-Key of it is not used up.
    """
    line = b'{"kind": "flag", "messages": [{"role": "user", "content": "a"}], "answer": "b"}\n'
    async with running(tmp_path, vllm) as at:
        key = await at.key("inference", "feedback")
        for path, body, kind in (
            (CHAT, b'{"model":"%s","messages":[]}' % PROJECT.encode(), "application/json"),
            ("/v1/feedback", line, "application/json"),
            ("/v1/feedback", line, "application/x-ndjson"),
        ):
            async with Client(at, key) as client:
                await client.send(client.head(path, 10_000, content_type=kind, idempotency_key="k") + body)
                await asyncio.sleep(0.1)
        await asyncio.sleep(0.1)
        assert not vllm.seen
        assert await count(at.database, Feedback) == 0
        async with await at.client("feedback") as client_:
            again = await client_.post("/v1/feedback", content=line, headers={"Idempotency-Key": "k"})
            assert again.status_code == 202


async def test_bytes_that_are_no_text(tmp_path: Path, vllm: FakeVllm) -> None:
    """In headers, in the path and in a body: refused or passed by, never an error of ours."""
    async with running(tmp_path, vllm) as at:
        key = await at.key("inference", "feedback")
        for changed in (
            (b"host: x", b"host: x\r\nx-request-id: \xff\xfe\r\nx-session-id: \xe2\x82"),
            (b"host: x", b"host: x\r\ntraceparent: \xff\r\naccept: \xc3\x28"),
            (b"/v1/chat/completions", b"/v1/\xff\xfe"),
            (b"/v1/chat/completions", b"/v1/%ff%00"),
            (b"hello", b"hel\xff\xfe"),
            (b"Bearer ", b"Bearer \xff"),
        ):
            async with Client(at, key) as client:
                await client.send(client.asks().replace(*changed))
                status = int((await client.reader.readuntil(b"\r\n")).split()[1])
                assert status in ({200} if changed[0] == b"host: x" else {400, 401, 404}), changed


def test_open_files_bound_the_connections(monkeypatch: pytest.MonkeyPatch) -> None:
    """However many clients come, database and engines still find files to open."""
    set_to: list[tuple[int, int]] = []
    monkeypatch.setattr(resource, "setrlimit", lambda _, limits: set_to.append(limits))
    for limits, room, raised in (
        ((1024, 1024), 768, []),
        ((1024, 8192), 8192 - 256, [(8192, 8192)]),
        ((256, 256), 128, []),
    ):
        set_to.clear()
        monkeypatch.setattr(resource, "getrlimit", lambda _, found=limits: found)
        assert (http_guard.room_for_connections(), set_to) == (room, raised)
    assert HttpSettings().max_connections == 10_000
