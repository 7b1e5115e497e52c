"""The data plane: OpenAI-compatible requests streamed through to vLLM, under the alias that apps ask for.

Everything passes untouched but the model's name and the request id, which is ours so that nobody can forge an exchange.
vLLM's own errors pass as they are; ours have the same form. Captures each exchange, and never waits for that.
"""

from __future__ import annotations

import asyncio
import re
import secrets
import time
from collections.abc import Awaitable, Callable, Coroutine, Mapping
from dataclasses import dataclass
from typing import Any

import msgspec
import structlog
from litestar.enums import ScopeType
from litestar.types import Receive, Scope, Send

from labeling.errors import NightschoolError
from service.alias_table import AliasTable, Flight, UnknownModel
from service.auth import Caller, KeyRing
from service.auth import Scope as KeyScope
from service.capture import Captured, CaptureQueue
from service.engine_connection import Answer, BrokeOff
from service.metrics import Metrics
from service.openai_form import ModelName, error_body, error_of, model_card, parse_request, with_model
from service.problems import BodyTooLarge, headers_of
from service.upstream import EngineBrokeOff, Replicas

log = structlog.get_logger(__name__)
ID_PREFIX = {"/v1/chat/completions": "chatcmpl-", "/v1/completions": "cmpl-"}
PASSED_ON = (b"accept", b"traceparent", b"tracestate")  # of the request's headers
PASSED_BACK = (b"content-type", b"retry-after")  # of the engine's
CONTROL = re.compile(rb"[\x00-\x08\x0a-\x1f\x7f]")
CLIENT_LEFT = 499
KEPT_BYTES = 16 * 1024 * 1024  # of one stream: a longer one passes, and is not captured
Headers = list[tuple[bytes, bytes]]
JSON: Headers = [(b"content-type", b"application/json")]


class ClientLeft(Exception):
    """Before its request was whole."""


class Reply:
    """One ASGI answer: knows whether it was begun, and for which project it is counted."""

    def __init__(self, send: Send) -> None:
        self._send = send
        self.status = 0
        self.project = ""

    async def start(self, status: int, headers: Headers) -> None:
        self.status = status
        await self._send({"type": "http.response.start", "status": status, "headers": headers})

    async def body(self, data: bytes, more: bool = False) -> None:
        await self._send({"type": "http.response.body", "body": data, "more_body": more})

    async def whole(self, status: int, data: bytes, headers: Headers) -> None:
        await self.start(status, [*headers, (b"content-length", str(len(data)).encode())])
        await self.body(data)


@dataclass(frozen=True)
class Request:
    """One completion asked for, and what is kept of it."""

    caller: Caller
    path: str
    body: bytes
    fields: dict[str, msgspec.Raw]
    headers: Mapping[bytes, bytes]
    flight: Flight
    started: float
    own_id: str

    @property
    def completion_id(self) -> str:
        """As vLLM derives it from the X-Request-Id that we send."""
        return ID_PREFIX[self.path] + self.own_id

    @property
    def seconds(self) -> float:
        return time.perf_counter() - self.started

    def upstream_headers(self) -> bytes:
        """Whole lines. Values with control characters would be lines of their own: they are left out."""
        lines = [b"content-type: application/json\r\nx-request-id: " + self.own_id.encode()]
        for name in PASSED_ON:
            value = self.headers.get(name)
            if value is not None and not CONTROL.search(value):
                lines.append(name + b": " + value)
        lines.append(b"")
        return b"\r\n".join(lines)

    def reply_headers(self, answer: Answer) -> Headers:
        kept = [(name, answer.headers[name]) for name in PASSED_BACK if name in answer.headers]
        kept.append((b"x-nightschool-exchange", self.completion_id.encode()))
        if theirs := self.headers.get(b"x-request-id"):
            kept.append((b"x-request-id", theirs))
        return kept

    def named(self, header: bytes) -> str | None:
        return self.headers.get(header, b"").decode("latin-1")[:256] or None

    def captured(self, response: bytes, *, streamed: bool, aborted: bool = False) -> Captured | None:
        """None where no one project can be named: the base, asked for with a key of every project."""
        route = self.flight.route
        if route.project is None:
            return None
        return Captured(
            project=route.project,
            completion_id=self.completion_id,
            served=route.served,
            request=self.body,
            response=response,
            streamed=streamed,
            aborted=aborted,
            latency_ms=self.seconds * 1000,
            request_id=self.named(b"x-request-id"),
            session_id=self.named(b"x-session-id"),
            key_id=self.caller.key_id,
        )


class Gateway:
    def __init__(
        self,
        aliases: AliasTable,
        replicas: Replicas,
        keys: KeyRing,
        capture: CaptureQueue,
        metrics: Metrics,
        max_body_bytes: int,
    ) -> None:
        self._aliases = aliases
        self._replicas = replicas
        self._keys = keys
        self._capture = capture
        self._metrics = metrics
        self._max_body_bytes = max_body_bytes

    async def complete(self, scope: Scope, receive: Receive, send: Send) -> None:
        """POST /v1/chat/completions and /v1/completions."""
        await self._answer(self._complete, "POST", scope, receive, send)

    async def models(self, scope: Scope, receive: Receive, send: Send) -> None:
        """GET /v1/models: the caller's aliases."""
        await self._answer(self._models, "GET", scope, receive, send)

    def model(self, authorization: str | None, name: str) -> tuple[int, bytes]:
        """GET /v1/models/{name}: the status and body; no raw handler, Litestar gives those no path parameters."""
        try:
            cards = self._cards(authorization)
            if name not in cards:
                raise UnknownModel(f"The model `{name}` does not exist.")
        except NightschoolError as error:
            return error_of(error)
        return 200, msgspec.json.encode(cards[name])

    async def _answer(
        self,
        handle: Callable[[Reply, Scope, Receive], Awaitable[None]],
        method: str,
        scope: Scope,
        receive: Receive,
        send: Send,
    ) -> None:
        """The request's boundary: every error becomes an answer in OpenAI's form, as far as none was begun."""
        if scope["type"] == ScopeType.WEBSOCKET:  # a web socket, closed before it was accepted: its client sees 403
            await send({"type": "websocket.close", "code": 1008, "reason": f"use {method}"})
            return
        reply = Reply(send)
        try:
            if scope["method"] == method:
                await handle(reply, scope, receive)
            else:
                await reply.whole(405, error_body(405, f"use {method}"), [*JSON, (b"allow", method.encode())])
        except ClientLeft:
            pass
        except NightschoolError as error:
            status, body = error_of(error)
            extra = [(name.lower().encode(), value.encode()) for name, value in headers_of(error).items()]
            await _refuse(reply, status, body, extra)
        except Exception as error:
            log.error("request_failed", path=scope["path"], exc_info=error)
            await _refuse(reply, 500, error_body(500, "an error of ours; the log has its details"), [])
        finally:
            self._metrics.requests.labels(reply.project, str(reply.status or CLIENT_LEFT)).inc()

    async def _models(self, reply: Reply, scope: Scope, _: Receive) -> None:
        cards = self._cards(_authorization(dict(scope["headers"])))
        await reply.whole(200, msgspec.json.encode({"object": "list", "data": list(cards.values())}), JSON)

    def _cards(self, authorization: str | None) -> dict[str, dict[str, Any]]:
        caller = self._keys.authenticate(authorization)
        if not caller.may(KeyScope.READ):
            caller.require(KeyScope.INFERENCE)
        return {name: model_card(name) for name in self._aliases.projects if caller.sees(name)}

    async def _complete(self, reply: Reply, scope: Scope, receive: Receive) -> None:
        started = time.perf_counter()
        headers = dict(scope["headers"])
        caller = self._keys.authenticate(_authorization(headers))
        caller.require(KeyScope.INFERENCE)
        body = await read_body(headers, receive, self._max_body_bytes)
        fields, model = parse_request(body)
        with self._aliases.flight(model, caller) as flight:
            reply.project = flight.route.project or ""
            path = scope["path"].rstrip("/")
            request = Request(caller, path, body, fields, headers, flight, started, secrets.token_hex(16))
            await while_connected(receive, self._exchange(reply, request))
            self._metrics.seconds.labels(reply.project).observe(request.seconds)

    async def _exchange(self, reply: Reply, request: Request) -> None:
        route = request.flight.route
        body = with_model(request.fields, route.served)
        answer = await self._replicas.ask(request.flight, request.path, body, request.upstream_headers())
        try:
            self._metrics.first_byte.labels(reply.project).observe(request.seconds)
            name = ModelName.of(route.served, route.requested)
            if answer.headers.get(b"content-type", b"").startswith(b"text/event-stream"):
                await self._stream(reply, request, answer, name)
            else:
                await self._whole(reply, request, answer, name)
        finally:
            answer.close()  # an unfinished answer's connection is cut: vLLM stops generating

    async def _whole(self, reply: Reply, request: Request, answer: Answer, name: ModelName) -> None:
        try:
            body = await answer.read()
        except BrokeOff as error:
            raise EngineBrokeOff("the engine broke off in the middle of its answer") from error
        if answer.status == 200:
            self._keep(request.captured(body, streamed=False))
        await reply.whole(answer.status, name.whole(body), request.reply_headers(answer))

    async def _stream(self, reply: Reply, request: Request, answer: Answer, name: ModelName) -> None:
        await reply.start(answer.status, request.reply_headers(answer))
        passed, size = list[bytes](), 0
        complete = False
        line = name.lines()
        try:
            while piece := await answer.piece():
                if lines := line.feed(piece):
                    size += len(lines)
                    if size <= KEPT_BYTES:
                        passed.append(lines)
                    await reply.body(lines, more=True)
            complete = True
        except BrokeOff as error:
            log.warning("stream_broke_off", exchange=request.completion_id, error=str(error))
            broken = error_body(502, "the engine broke off in the middle of its answer")
            await reply.body(b"data: " + broken + b"\n\n", more=True)
        finally:
            if size > KEPT_BYTES:
                self._capture.drop("answer_too_long")
            elif passed:
                self._keep(request.captured(b"".join(passed), streamed=True, aborted=not complete))
        await reply.body(line.rest() if complete else b"")

    def _keep(self, captured: Captured | None) -> None:
        if captured is not None:
            self._capture.offer(captured)


async def read_body(headers: Mapping[bytes, bytes], receive: Receive, limit: int) -> bytes:
    declared = headers.get(b"content-length", b"")
    parts: list[bytes] = []
    size = int(declared) if declared.isdigit() else 0
    taken = 0
    more = size <= limit
    while more:
        message = await receive()
        if message["type"] != "http.request":
            raise ClientLeft
        parts.append(message["body"])
        taken += len(message["body"])
        size = taken
        more = message["more_body"] and size <= limit
    if size > limit:
        raise BodyTooLarge(f"the body has more than {limit} bytes")
    return b"".join(parts)


async def while_connected(receive: Receive, work: Coroutine[Any, Any, None]) -> None:
    """Runs the work; when the client hangs up first, cancels it."""
    ours = asyncio.current_task()
    assert ours is not None
    gone = False

    async def listen() -> None:
        nonlocal gone
        while (await receive())["type"] != "http.disconnect":
            pass
        gone = True
        ours.cancel()

    listener = asyncio.create_task(listen())
    try:
        await work
    except asyncio.CancelledError:
        if not gone or ours.uncancel():  # somebody else wants this to end, too
            raise
    finally:
        listener.cancel()


async def _refuse(reply: Reply, status: int, body: bytes, headers: Headers) -> None:
    if not reply.status:
        await reply.whole(status, body, [*JSON, *headers])


def _authorization(headers: Mapping[bytes, bytes]) -> str | None:
    value = headers.get(b"authorization")
    return None if value is None else value.decode("latin-1")
