"""The data plane: OpenAI-compatible requests streamed through to vLLM, under the alias that apps ask for.

Everything passes untouched but the model's name and the request id, which is ours so that nobody can forge an exchange.
vLLM's own errors pass as they are; ours have the same form. Captures each exchange, and never waits for that.
"""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import Awaitable, Callable, Coroutine
from dataclasses import dataclass
from typing import Any

import aiohttp
import msgspec
import structlog
from litestar.enums import ScopeType
from litestar.types import Receive, Scope, Send

from labeling.errors import NightschoolError
from service.alias_table import AliasTable, Flight, UnknownModel
from service.auth import Caller, KeyRing
from service.auth import Scope as KeyScope
from service.capture import Captured, CaptureQueue
from service.metrics import Metrics
from service.openai_form import ModelName, error_body, error_of, model_card, parse_request, with_model
from service.problems import BodyTooLarge, headers_of
from service.upstream import EngineBrokeOff, Replicas

log = structlog.get_logger(__name__)
ID_PREFIX = {"/v1/chat/completions": "chatcmpl-", "/v1/completions": "cmpl-"}
PASSED_ON = ("accept", "traceparent", "tracestate")  # of the request's headers
CLIENT_LEFT = 499
Headers = list[tuple[bytes, bytes]]
JSON: Headers = [(b"content-type", b"application/json")]


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
    headers: dict[str, str]
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

    def upstream_headers(self) -> dict[str, str]:
        passed = {name: self.headers[name] for name in PASSED_ON if name in self.headers}
        return {
            **passed,
            "Content-Type": "application/json",
            "Accept-Encoding": "identity",
            "X-Request-Id": self.own_id,
        }

    def reply_headers(self, response: aiohttp.ClientResponse) -> Headers:
        kept = {name: response.headers[name] for name in ("Content-Type", "Retry-After") if name in response.headers}
        named = {**kept, "x-nightschool-exchange": self.completion_id, "x-request-id": self.headers.get("x-request-id")}
        return [(k.lower().encode(), v.encode("latin-1", "replace")) for k, v in named.items() if v]

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
            request_id=self.headers.get("x-request-id", "")[:256] or None,
            session_id=self.headers.get("x-session-id", "")[:256] or None,
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
        cards = self._cards(_headers(scope).get("authorization"))
        await reply.whole(200, msgspec.json.encode({"object": "list", "data": list(cards.values())}), JSON)

    def _cards(self, authorization: str | None) -> dict[str, dict[str, Any]]:
        caller = self._keys.authenticate(authorization)
        if not caller.may(KeyScope.READ):
            caller.require(KeyScope.INFERENCE)
        return {name: model_card(name) for name in self._aliases.projects if caller.sees(name)}

    async def _complete(self, reply: Reply, scope: Scope, receive: Receive) -> None:
        started = time.perf_counter()
        headers = _headers(scope)
        caller = self._keys.authenticate(headers.get("authorization"))
        caller.require(KeyScope.INFERENCE)
        body = await read_body(headers, receive, self._max_body_bytes)
        fields, model = parse_request(body)
        with self._aliases.flight(model, caller) as flight:
            reply.project = flight.route.project or ""
            path = scope["path"].rstrip("/")
            request = Request(caller, path, body, fields, headers, flight, started, uuid.uuid4().hex)
            await while_connected(receive, self._exchange(reply, request))
            self._metrics.seconds.labels(reply.project).observe(request.seconds)

    async def _exchange(self, reply: Reply, request: Request) -> None:
        route = request.flight.route
        body = with_model(request.fields, route.served)
        response = await self._replicas.ask(request.flight, request.path, body, request.upstream_headers())
        self._metrics.first_byte.labels(reply.project).observe(request.seconds)
        name = ModelName(route.served, route.requested)
        try:
            if response.content_type == "text/event-stream":
                await self._stream(reply, request, response, name)
            else:
                await self._whole(reply, request, response, name)
        finally:
            response.close()  # an unfinished answer's connection is cut: vLLM stops generating

    async def _whole(self, reply: Reply, request: Request, response: aiohttp.ClientResponse, name: ModelName) -> None:
        try:
            body = await response.read()
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            raise EngineBrokeOff("the engine broke off in the middle of its answer") from error
        if response.status == 200:
            self._keep(request.captured(body, streamed=False))
        await reply.whole(response.status, name.whole(body), request.reply_headers(response))

    async def _stream(self, reply: Reply, request: Request, response: aiohttp.ClientResponse, name: ModelName) -> None:
        await reply.start(response.status, request.reply_headers(response))
        passed: list[bytes] = []
        complete = False
        try:
            async for chunk in response.content.iter_any():
                if lines := name.feed(chunk):
                    passed.append(lines)
                    await reply.body(lines, more=True)
            complete = True
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            log.warning("stream_broke_off", exchange=request.completion_id, error=str(error))
            broken = error_body(502, "the engine broke off in the middle of its answer")
            await reply.body(b"data: " + broken + b"\n\n", more=True)
        finally:
            if passed:
                self._keep(request.captured(b"".join(passed), streamed=True, aborted=not complete))
        await reply.body(name.rest() if complete else b"")

    def _keep(self, captured: Captured | None) -> None:
        if captured is not None:
            self._capture.offer(captured)


async def read_body(headers: dict[str, str], receive: Receive, limit: int) -> bytes:
    declared = headers.get("content-length", "")
    parts: list[bytes] = []
    size = int(declared) if declared.isdecimal() else 0
    more = size <= limit
    while more:
        message = await receive()
        if message["type"] != "http.request":
            break
        parts.append(message["body"])
        size = sum(map(len, parts))
        more = message["more_body"] and size <= limit
    if size > limit:
        raise BodyTooLarge(f"the body has more than {limit} bytes")
    return b"".join(parts)


async def while_connected(receive: Receive, work: Coroutine[Any, Any, None]) -> None:
    """Runs the work; when the client hangs up first, cancels it."""
    task = asyncio.create_task(work)
    gone = asyncio.create_task(_hang_up(receive))
    try:
        await asyncio.wait((task, gone), return_when=asyncio.FIRST_COMPLETED)
    finally:
        gone.cancel()
        task.cancel()  # nothing, where it is done
        await asyncio.gather(task, gone, return_exceptions=True)
    if not task.cancelled():
        task.result()


async def _hang_up(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _refuse(reply: Reply, status: int, body: bytes, headers: Headers) -> None:
    if not reply.status:
        await reply.whole(status, body, [*JSON, *headers])


def _headers(scope: Scope) -> dict[str, str]:
    return {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}
