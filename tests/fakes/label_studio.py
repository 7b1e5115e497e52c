"""Faults on demand before a real Label Studio, and on the way of its webhooks: passes on all that it is not to break.

Not an imitation: what arrives behind it is committed by the real server, also where the answer is then lost.
"""

from __future__ import annotations

import re
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import httpx

from tests.running import serving

Hook = Callable[[], Awaitable[None]]
HOP_BY_HOP = {b"host", b"content-length", b"transfer-encoding", b"connection", b"accept-encoding", b"content-encoding"}


@dataclass
class Fault:
    """Once, for the next request of this method whose path matches."""

    method: str  # regular expression, as `path`
    path: str
    status: int | None = None  # what is answered instead
    forwarded: bool = True  # the real server gets the request first
    before: Hook | None = None  # awaited before the real server gets the request
    hook: Hook | None = None  # awaited between the real server's answer and ours
    cut: bool = False  # the connection breaks instead of an answer


class LabelStudioProxy:
    def __init__(self, target: str) -> None:
        self.requests: list[tuple[str, str]] = []
        self.chance: Callable[[str, str], Fault | None] = lambda _method, _path: (
            None
        )  # for each request: faults at random
        self._faults: list[Fault] = []
        self._http = httpx.AsyncClient(base_url=target, timeout=60, trust_env=False)

    def fail(self, method: str, path: str, **fault: Any) -> None:
        self._faults.append(Fault(method, path, **fault))

    async def __call__(self, scope: dict[str, Any], receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            await _lifespan(receive, send)
            return
        method, path = scope["method"], scope["path"]
        self.requests.append((method, path))
        fault = self._due(method, path) or self.chance(method, path)
        response = httpx.Response(200)
        body = await _body(receive)
        if fault is not None and fault.before is not None:
            await fault.before()
        if fault is None or fault.forwarded:
            response = await self._forward(scope, body)
        if fault is not None and fault.hook is not None:
            await fault.hook()
        if fault is not None and fault.status is not None:
            response = httpx.Response(fault.status, json={"detail": "broken by the test"})
        headers = [(name.lower(), value) for name, value in response.headers.raw if name.lower() not in HOP_BY_HOP]
        if fault is not None and fault.cut:
            headers = [(b"content-length", b"1")]  # and no body: the server under us drops the connection
            await send({"type": "http.response.start", "status": 200, "headers": headers})
            return
        await send({"type": "http.response.start", "status": response.status_code, "headers": headers})
        await send({"type": "http.response.body", "body": response.content})

    def _due(self, method: str, path: str) -> Fault | None:
        for fault in self._faults:
            if re.fullmatch(fault.method, method) and re.search(fault.path, path):
                self._faults.remove(fault)
                return fault
        return None

    async def _forward(self, scope: dict[str, Any], body: bytes) -> httpx.Response:
        headers = [(name, value) for name, value in scope["headers"] if name not in HOP_BY_HOP]
        url = httpx.URL(path=scope["path"], query=scope["query_string"])
        return await self._http.request(scope["method"], url, headers=headers, content=body)

    async def close(self) -> None:
        await self._http.aclose()


async def _body(receive: Any) -> bytes:
    body, more = b"", True
    while more:
        message = await receive()
        body, more = body + message.get("body", b""), message.get("more_body", False)
    return body


async def _lifespan(receive: Any, send: Any) -> None:
    while True:
        message = await receive()
        await send({"type": f"{message['type']}.complete"})
        if message["type"] == "lifespan.shutdown":
            return


class WebhookRelay:
    """Stands where Label Studio sends its webhooks. `lose`, `double` and `hold` say what happens to the next ones."""

    def __init__(self, target: str) -> None:
        self.taken: list[str] = []
        self.lose = self.double = self.hold = False
        self._held: list[tuple[str, dict[str, str], bytes]] = []
        self._http = httpx.AsyncClient(base_url=target, timeout=10, trust_env=False)

    async def __call__(self, scope: dict[str, Any], receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            await _lifespan(receive, send)
            return
        body = await _body(receive)
        self.taken.append(scope["path"])
        wanted = (name for name, _ in scope["headers"] if name not in HOP_BY_HOP)
        sent = dict(scope["headers"])
        call = (scope["path"], {name.decode(): sent[name].decode() for name in wanted}, body)
        await send({"type": "http.response.start", "status": 204, "headers": []})
        await send({"type": "http.response.body", "body": b""})
        if self.hold:
            self._held.append(call)
        elif not self.lose:
            for _ in range(2 if self.double else 1):
                await self._pass_on(call)

    async def release(self) -> None:
        """What was held, the last first."""
        while self._held:
            await self._pass_on(self._held.pop())

    async def _pass_on(self, call: tuple[str, dict[str, str], bytes]) -> None:
        path, headers, body = call
        (await self._http.post(path, headers=headers, content=body)).raise_for_status()

    async def close(self) -> None:
        await self._http.aclose()


@asynccontextmanager
async def webhook_relay(target: str, host: str) -> AsyncIterator[tuple[str, WebhookRelay]]:
    """`host`: an address that Label Studio may call."""
    relay = WebhookRelay(target)
    async with serving(relay, host) as url:
        yield url, relay
    await relay.close()


@asynccontextmanager
async def label_studio_proxy(target: str) -> AsyncIterator[tuple[str, LabelStudioProxy]]:
    proxy = LabelStudioProxy(target)
    async with serving(proxy) as url:
        yield url, proxy
    await proxy.close()
