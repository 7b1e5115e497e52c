"""The review queue over HTTP: its report, what stands at its head and why, and items taken out of it."""

from __future__ import annotations

from typing import Any

from litestar import Request, delete, get
from litestar.handlers import HTTPRouteHandler
from litestar.params import FromPath

from labeling.queue_report import next_items, queue_report
from labeling.withdrawal import withdraw
from loop.label_fixes import label_fixes
from service.auth import Scope
from service.routes.nights import NightDesk

MOST = 500


def queue_routes(desk: NightDesk) -> list[HTTPRouteHandler]:
    @get("/v1/projects/{project:str}/queue/report", tags=["queue"], summary="Length, age, held back, lift of selection")
    async def show_report(request: Request[Any, Any, Any], project: str) -> dict[str, Any]:
        desk.caller(request, Scope.READ, project)
        name, database = desk.project(project).name, desk.clients.database
        report = await queue_report(database, name)
        return {**report, "fixes": await label_fixes(database, desk.data_dir, name)}

    @get("/v1/projects/{project:str}/queue/next", tags=["queue"], summary="The next items, and why they stand there")
    async def show_next(request: Request[Any, Any, Any], project: str, limit: int = 20) -> list[dict[str, Any]]:
        desk.caller(request, Scope.READ, project)
        return await next_items(desk.clients.database, desk.project(project).name, max(1, min(limit, MOST)))

    @delete(
        "/v1/projects/{project:str}/queue/items/{item_id:str}",
        status_code=200,
        tags=["queue"],
        summary="Take an item out of the queue, for good",
    )
    async def take_out(
        request: Request[Any, Any, Any], project: FromPath[str], item_id: FromPath[str], reason: str = ""
    ) -> dict[str, Any]:
        by = desk.caller(request, Scope.ADMIN, project).name
        return await withdraw(desk.clients.database, desk.project(project).name, item_id, by, reason)

    return [show_report, show_next, take_out]
