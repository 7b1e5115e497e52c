"""What Litestar and aiohttp can do at best as a pass-through: no key, no alias, no capture. The gateway is held to it.

A process of its own: `python -m service.bench.passthrough PORT ENGINE_URL`.
"""

from __future__ import annotations

import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import aiohttp
import uvicorn
from litestar import Litestar, Request, Response, get, post


def application(engine: str) -> Litestar:
    @asynccontextmanager
    async def client(app: Litestar) -> AsyncIterator[None]:
        connector = aiohttp.TCPConnector(limit=0)
        async with aiohttp.ClientSession(
            connector=connector, auto_decompress=False, cookie_jar=aiohttp.DummyCookieJar()
        ) as app.state.client:
            yield

    @post("/v1/chat/completions", status_code=200)
    async def complete(request: Request[Any, Any, Any]) -> Response[bytes]:
        body = await request.body()
        headers = {"Content-Type": "application/json"}
        url = f"{engine}/v1/chat/completions"
        async with request.app.state.client.post(url, data=body, headers=headers) as answer:
            said = await answer.read()
        return Response(said, status_code=answer.status, media_type=answer.content_type)

    @get("/health", sync_to_thread=False)
    def health() -> None:
        return None

    return Litestar([complete, health], lifespan=[client], openapi_config=None, logging_config=None)


if __name__ == "__main__":
    app: Any = application(sys.argv[2])
    uvicorn.run(app, port=int(sys.argv[1]), log_level="warning", access_log=False, loop="uvloop", http="httptools")
