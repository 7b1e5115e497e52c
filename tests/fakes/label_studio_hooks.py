"""Webhooks of the small Label Studio: one try each, and nobody waits for it."""

from __future__ import annotations

import asyncio
import ipaddress
from collections.abc import Iterator
from typing import Any
from urllib.parse import urlsplit

from aiohttp import ClientError, ClientSession, ClientTimeout, web

from service.servers import HOOK_HOST

Row = dict[str, Any]


class Refused(Exception):
    def __init__(self, status: int, **body: Any) -> None:
        super().__init__(str(body))
        self.status, self.body = status, body


class Webhooks:
    def __init__(self, numbers: Iterator[int]) -> None:
        self._rows: dict[int, Row] = {}
        self._numbers = numbers
        self._calls: set[asyncio.Task[None]] = set()

    async def listed(self, request: web.Request) -> Any:
        return [row for row in self._rows.values() if row["project"] == int(request.query["project"])]

    async def make(self, request: web.Request) -> Any:
        body = _taken(await request.json())
        row = {"headers": {}, "actions": [], "is_active": True, **body, "id": next(self._numbers)}
        self._rows[row["id"]] = row
        return web.json_response(row, status=201)

    async def change(self, request: web.Request) -> Any:
        row = self._rows[int(request.match_info["id"])]
        row.update(_taken(await request.json()))
        return row

    async def delete(self, request: web.Request) -> Any:
        if self._rows.pop(int(request.match_info["id"]), None) is None:
            raise Refused(404, detail="No Webhook matches the given query.")
        return web.Response(status=204)

    def tell(self, project: int, action: str) -> None:
        for hook in self._rows.values():
            if hook["project"] == project and hook["is_active"] and action in hook["actions"]:
                call = asyncio.create_task(_call(hook, action))
                self._calls.add(call)
                call.add_done_callback(self._calls.discard)


def _taken(hook: Row) -> Row:
    if reason := _refusal(urlsplit(hook.get("url", "")).hostname or ""):
        raise Refused(400, validation_errors={"url": [reason]})
    return hook


def _refusal(host: str) -> str | None:
    """Private addresses are not taken, but for the one that a managed server may call."""
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return None if "." in host else "Enter a valid URL."
    return None if address.is_global or host == HOOK_HOST else f"URL resolves to a reserved address: {host}"


async def _call(hook: Row, action: str) -> None:
    try:
        async with ClientSession(timeout=ClientTimeout(total=1)) as client:
            await client.post(hook["url"], json={"action": action}, headers=hook["headers"])
    except (ClientError, TimeoutError):
        return  # it has one try
