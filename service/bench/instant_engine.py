"""An engine that answers at once, in vLLM's words: for measuring what stands in front of one.

A process of its own, `python -m service.bench.instant_engine PORT`: asyncio, httptools and nothing between, so that it
is never the slowest part. A body's `tokens_per_second` paces a stream as an engine's steps would; 0 is at full speed.
"""

from __future__ import annotations

import asyncio
import sys
import time
from typing import cast

import httptools
import msgspec
import uvloop

WORDS = (" the", " answer", " to", " that", " is", " a", " longer", " one", " of", " course", ",", " as", " ever")
HEAD = b"HTTP/1.1 200 OK\r\ndate: Wed, 25 Nov 2026 00:00:00 GMT\r\nserver: uvicorn\r\n"
STREAMED = b"content-type: text/event-stream; charset=utf-8\r\ntransfer-encoding: chunked\r\n\r\n"
EVENT = (
    b'data: {"id":"%b","object":"chat.completion.chunk","created":1764028800,"model":%b,"choices":[{"index":0,'
    b'"delta":{"content":"%b"},"logprobs":null,"finish_reason":%b,"token_ids":null}]}\n\n'
)
WHOLE = (
    b'{"id":"%b","object":"chat.completion","created":1764028800,"model":%b,"choices":[{"index":0,"message":'
    b'{"role":"assistant","content":"%b","refusal":null,"annotations":null,"audio":null,"function_call":null,'
    b'"tool_calls":[],"reasoning":null},"logprobs":null,"finish_reason":"stop","stop_reason":null,"token_ids":null}],'
    b'"service_tier":null,"system_fingerprint":null,"usage":{"prompt_tokens":87,"total_tokens":%d,'
    b'"completion_tokens":%d,"prompt_tokens_details":null},"prompt_logprobs":null,"kv_transfer_params":null}'
)


class Asked(msgspec.Struct):
    model: str = "base"
    max_tokens: int = 96
    stream: bool = False
    tokens_per_second: float = 0.0


class Engine(asyncio.Protocol):
    """One connection, one request after the other."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._parser = httptools.HttpRequestParser(self)
        self._body = b""
        self._id = b""
        self._stream: Stream | None = None
        self.writable = True

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)  # uvloop's is no subclass

    def connection_lost(self, _: Exception | None) -> None:
        self._end_stream()

    def data_received(self, data: bytes) -> None:
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError:
            self.transport.close()

    def pause_writing(self) -> None:
        self.writable = False

    def resume_writing(self) -> None:
        self.writable = True
        if self._stream is not None:
            self._stream.go_on()

    def on_message_begin(self) -> None:
        self._body = self._id = b""

    def on_header(self, name: bytes, value: bytes) -> None:
        if name.lower() == b"x-request-id":
            self._id = value

    def on_body(self, part: bytes) -> None:
        self._body += part

    def on_message_complete(self) -> None:
        if not self._body:  # GET /health
            self.transport.write(HEAD + b"content-length: 0\r\n\r\n")
            return
        asked = msgspec.json.decode(self._body, type=Asked)
        name = b"chatcmpl-" + self._id
        if asked.stream:
            self._stream = Stream(self, self._loop, asked, name)
            return
        text = "".join(WORDS[place % len(WORDS)] for place in range(asked.max_tokens)).encode()
        model = msgspec.json.encode(asked.model)
        body = WHOLE % (name, model, text, 87 + asked.max_tokens, asked.max_tokens)
        length = b"content-length: %d\r\ncontent-type: application/json\r\n\r\n" % len(body)
        self.transport.write(HEAD + length + body)

    def _end_stream(self) -> None:
        if self._stream is not None:
            self._stream.cancel()
            self._stream = None


class Stream:
    """One token an event, each at its due time: one that comes late makes up for it, as with a real engine's queue."""

    def __init__(self, engine: Engine, loop: asyncio.AbstractEventLoop, asked: Asked, name: bytes) -> None:
        self._engine, self._loop, self._asked, self._name = engine, loop, asked, name
        self._model = msgspec.json.encode(asked.model)
        self._sent = 0
        self._started = time.monotonic()
        self._timer: asyncio.Handle | None = None
        engine.transport.write(HEAD + STREAMED)
        self._wait()

    def cancel(self) -> None:
        if self._timer is not None:
            self._timer.cancel()

    def go_on(self) -> None:
        if self._timer is None:
            self._wait()

    def _wait(self) -> None:
        rate = self._asked.tokens_per_second
        due = self._started + (self._sent + 1) / rate - time.monotonic() if rate else 0.0
        self._timer = self._loop.call_later(due, self._step) if due > 0 else self._loop.call_soon(self._step)

    def _step(self) -> None:
        self._timer = None
        if self._sent == self._asked.max_tokens:
            self._engine.transport.write(chunk(b"data: [DONE]\n\n") + b"0\r\n\r\n")
            return
        self._sent += 1
        finish = b'"stop"' if self._sent == self._asked.max_tokens else b"null"
        word = WORDS[self._sent % len(WORDS)].encode()
        self._engine.transport.write(chunk(EVENT % (self._name, self._model, word, finish)))
        if self._engine.writable:
            self._wait()


def chunk(data: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(data), data)


async def serve(port: int) -> None:
    server = await asyncio.get_running_loop().create_server(Engine, "127.0.0.1", port, backlog=2048)
    await server.serve_forever()


if __name__ == "__main__":
    uvloop.run(serve(int(sys.argv[1])))
