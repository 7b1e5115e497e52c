"""Faults on demand before a real Label Studio: passes everything on, except what a test told it to break.

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

    method: str
    path: str  # regular expression
    status: int | None = None  # what is answered instead
    forwarded: bool = True  # the real server gets the request first
    hook: Hook | None = None  # awaited between the real server's answer and ours


class LabelStudioProxy:
    def __init__(self, target: str) -> None:
        self.requests: list[tuple[str, str]] = []
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
        fault = self._due(method, path)
        response = httpx.Response(200)
        if fault is None or fault.forwarded:
            response = await self._forward(scope, await _body(receive))
        if fault is not None and fault.hook is not None:
            await fault.hook()
        if fault is not None and fault.status is not None:
            response = httpx.Response(fault.status, json={"detail": "broken by the test"})
        headers = [(name.lower(), value) for name, value in response.headers.raw if name.lower() not in HOP_BY_HOP]
        await send({"type": "http.response.start", "status": response.status_code, "headers": headers})
        await send({"type": "http.response.body", "body": response.content})

    def _due(self, method: str, path: str) -> Fault | None:
        for fault in self._faults:
            if fault.method == method and re.search(fault.path, path):
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


@asynccontextmanager
async def label_studio_proxy(target: str) -> AsyncIterator[tuple[str, LabelStudioProxy]]:
    proxy = LabelStudioProxy(target)
    async with serving(proxy) as url:
        yield url, proxy
    await proxy.close()
