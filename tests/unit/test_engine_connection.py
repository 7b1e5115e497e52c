"""The gateway's own HTTP client, against servers that speak well, badly, slowly or not at all."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

import pytest

from service import engine_pool
from service.engine_connection import MOST_WAITING_BYTES, BrokeOff
from service.engine_pool import NotConnected, Origin, Pool
from tests.running import eventually

Handler = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]
WHOLE = b"HTTP/1.1 200 OK\r\ncontent-length: 5\r\n\r\nhello"
CHUNKED = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"


class Engine:
    """Answers each request with `said`; remembers connections and requests."""

    def __init__(self, said: bytes = WHOLE, close: bool = False) -> None:
        self.said, self.close = said, close
        self.requests: list[bytes] = []
        self.connections = 0
        self.lost = 0

    async def __call__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        try:
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                length = int(head.lower().partition(b"content-length: ")[2].partition(b"\r\n")[0] or b"0")
                self.requests.append(head + await reader.readexactly(length))
                writer.write(self.said)
                await writer.drain()
                if self.close:
                    return
        except (asyncio.IncompleteReadError, ConnectionError):
            self.lost += 1
        finally:
            writer.close()


@asynccontextmanager
async def pool_before(
    engine: Handler, read_seconds: float = 5.0, path: str = "", key: str | None = None
) -> AsyncIterator[Pool]:
    server = await asyncio.start_server(engine, "127.0.0.1", 0)
    pool = Pool(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}{path}", read_seconds, key)
    try:
        yield pool
    finally:
        pool.close()
        server.close()


async def asked(pool: Pool) -> bytes:
    answer = await pool.post("/v1/x", b"content-type: application/json\r\n", b"{}")
    return await answer.read()


async def test_connections_are_used_again_until_they_are_old(monkeypatch: pytest.MonkeyPatch) -> None:
    """One after the other over one connection; none that has been idle for long; as many as there are requests."""
    engine = Engine()
    async with pool_before(engine) as pool:
        assert [await asked(pool) for _ in range(3)] == [b"hello"] * 3
        assert engine.connections == 1
        await asyncio.gather(*(asked(pool) for _ in range(5)))
        assert engine.connections == 5
        monkeypatch.setattr(engine_pool, "KEEP_ALIVE_SECONDS", 0.0)
        await asked(pool)
        assert engine.connections == 6


async def test_idle_connections_are_let_go(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_pool, "KEEP_ALIVE_SECONDS", 0.05)
    engine = Engine()
    async with pool_before(engine) as pool:
        await asyncio.gather(*(asked(pool) for _ in range(4)))
        await eventually(lambda: engine.lost == 4)
        assert not pool._open


async def test_the_request_is_what_it_should_be() -> None:
    """The path behind the engine's own, its key, and the body as it is."""
    engine = Engine()
    async with pool_before(engine, path="/engines/a/", key="s3cret") as pool:
        await asked(pool)
        assert (await (await pool.get("/health")).read()) == b"hello"
    post, get = engine.requests
    assert post.startswith(b"POST /engines/a/v1/x HTTP/1.1\r\nhost: 127.0.0.1:")
    assert b"\r\nauthorization: Bearer s3cret\r\n" in post
    assert post.endswith(b"content-type: application/json\r\ncontent-length: 2\r\n\r\n{}")
    assert get.startswith(b"GET /engines/a/health HTTP/1.1\r\n")


def test_where_an_engine_is() -> None:
    assert Origin.of("http://engine:8000/") == Origin("engine", 8000, False, "", "engine:8000")
    assert Origin.of("https://a.example/b") == Origin("a.example", 443, True, "/b", "a.example")
    assert Origin.of("http://[::1]:8000") == Origin("::1", 8000, False, "", "[::1]:8000")


@pytest.mark.parametrize(
    ("said", "close", "body"),
    [
        (CHUNKED + b"2\r\nhe\r\n3\r\nllo\r\n0\r\n\r\n", False, b"hello"),
        (b"HTTP/1.1 100 Continue\r\n\r\n" + WHOLE, False, b"hello"),
        (b"HTTP/1.1 200 OK\r\nconnection: close\r\n\r\nhello", True, b"hello"),
        (b"HTTP/1.0 200 OK\r\n\r\nhello", True, b"hello"),
        (b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n", False, b""),
        (b"HTTP/1.1 204 No Content\r\n\r\n", False, b""),
    ],
)
async def test_every_way_to_end_an_answer(said: bytes, close: bool, body: bytes) -> None:
    """A length, chunks, or the end of the connection; twice, so that a connection in doubt would show."""
    async with pool_before(Engine(said, close)) as pool:
        assert [await asked(pool) for _ in range(2)] == [body] * 2


@pytest.mark.parametrize(
    "said",
    [
        b"",
        b"not HTTP at all\r\n\r\n",
        b"HTTP/1.1 200 OK\r\n",
        b"HTTP/1.1 200 OK\r\ncontent-length: 9\r\n\r\nhello",
        CHUNKED + b"5\r\nhello\r\n",
        b"HTTP/1.1 101 Switching Protocols\r\nupgrade: x\r\nconnection: upgrade\r\n\r\n",
        b"HTTP/1.1 200 OK\r\n" + b"x-filler: %b\r\n" % (b"a" * 4000) * 20 + b"content-length: 5\r\n\r\nhello",
    ],
)
async def test_what_is_no_whole_answer_is_none(said: bytes) -> None:
    """Cut short, no HTTP, another protocol, headers without end: an error, and the connection is not used again."""
    async with pool_before(Engine(said, close=True)) as pool:
        for _ in range(2):
            with pytest.raises(BrokeOff):
                await asked(pool)
        assert not pool._idle


async def test_a_second_answer_to_one_request_reaches_nobody() -> None:
    """It would be taken for the answer to the next request."""
    engine = Engine(WHOLE + WHOLE.replace(b"hello", b"other"))
    async with pool_before(engine) as pool:
        assert [await asked(pool) for _ in range(3)] == [b"hello"] * 3
        assert engine.connections == 3


async def test_a_silent_engine_is_given_up() -> None:
    """Before its answer and in the middle of it; the clock starts anew with each byte."""

    async def silent(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        await asyncio.sleep(30)

    async def drips(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(CHUNKED)
        for _ in range(6):
            writer.write(b"1\r\nx\r\n")
            await asyncio.sleep(0.1)
        await asyncio.sleep(30)

    async with pool_before(silent, read_seconds=0.3) as pool:
        with pytest.raises(BrokeOff, match=r"nothing came for 0\.3 seconds"):
            await asked(pool)
    async with pool_before(drips, read_seconds=0.3) as pool:
        answer = await pool.post("/", b"", b"")
        got = b""
        with pytest.raises(BrokeOff, match="nothing came"):
            while piece := await answer.piece():
                got += piece
        assert got == b"xxxxxx"


async def test_nobody_listens() -> None:
    pool = Pool("http://127.0.0.1:9", 1.0)
    with pytest.raises(NotConnected):
        await pool.get("/health")


async def test_whoever_stops_waiting_cuts_the_connection() -> None:
    """Before the headers and in mid-stream."""

    async def begins(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        await reader.read()
        ended.append(True)
        writer.close()

    ended: list[bool] = []
    async with pool_before(begins) as pool:
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.1):
                await pool.get("/")
        await eventually(lambda: len(ended) == 1)


async def test_a_stream_that_nobody_reads_is_not_read_from_the_engine() -> None:
    """Memory stays bounded; what was held back comes when it is wanted."""
    sent = 0
    size = 64 * MOST_WAITING_BYTES

    async def pours(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal sent
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n" % size)
        while sent < size:
            writer.write(b"x" * 65_536)
            sent += 65_536
            await writer.drain()

    async with pool_before(pours) as pool:
        answer = await pool.get("/")
        await asyncio.sleep(0.3)
        assert answer._waiting_bytes < 3 * MOST_WAITING_BYTES
        assert sent < size
        got = 0
        while piece := await answer.piece():
            got += len(piece)
        assert got == size
