"""The review queue over HTTP: its report, and what stands at its head and why."""

from __future__ import annotations

from typing import Any

from litestar import Request, get
from litestar.handlers import HTTPRouteHandler

from labeling.queue_report import next_items, queue_report
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

    return [show_report, show_next]
