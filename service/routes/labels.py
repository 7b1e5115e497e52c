"""Labels, those who make them, gold questions and the labelling screen, over HTTP."""

from __future__ import annotations

from typing import Any

import msgspec
from litestar import Request, delete, get, post
from litestar.handlers import HTTPRouteHandler
from litestar.params import FromPath

from labeling.accepted_labels import accepted_labels
from labeling.annotators import annotators_report
from labeling.gold import InvalidGold, add_gold, gold_questions, parse_gold, retire_gold
from labeling.labelling_projects import labelling_project
from labeling.screen_upkeep import Screen, keep_screen
from service.auth import Scope
from service.problems import MalformedBody
from service.routes.nights import NightDesk

ROWS_AT_MOST = 1000


def label_routes(desk: NightDesk) -> list[HTTPRouteHandler]:
    return [*_labels(desk), *_gold(desk), *_screen(desk)]


def _labels(desk: NightDesk) -> list[HTTPRouteHandler]:
    @get("/v1/projects/{project:str}/labels", tags=["labels"], summary="Accepted labels: chosen, rejected, by whom")
    async def list_labels(
        request: Request[Any, Any, Any], project: FromPath[str], after: str = "", limit: int = ROWS_AT_MOST
    ) -> list[dict[str, Any]]:
        desk.caller(request, Scope.READ, project)
        name = desk.project(project).name
        return await accepted_labels(desk.clients.database, name, after, max(1, min(limit, ROWS_AT_MOST)))

    @get("/v1/projects/{project:str}/labels/annotators", tags=["labels"], summary="How well each labeller labels")
    async def show_annotators(request: Request[Any, Any, Any], project: FromPath[str]) -> dict[str, Any]:
        desk.caller(request, Scope.READ, project)
        settings = desk.project(project)
        return await annotators_report(desk.clients.database, settings.name, settings.labeling)

    return [list_labels, show_annotators]


def _gold(desk: NightDesk) -> list[HTTPRouteHandler]:
    @post("/v1/projects/{project:str}/gold", status_code=200, tags=["labels"], summary="Add gold questions")
    async def add(request: Request[Any, Any, Any], project: FromPath[str]) -> dict[str, int]:
        desk.caller(request, Scope.ADMIN, project)
        bodies = parse_gold(_list(await request.body()))
        added = await add_gold(desk.clients.database, desk.project(project).name, bodies)
        return {"added": added, "known": len(bodies) - added}

    @get("/v1/projects/{project:str}/gold", tags=["labels"], summary="Gold questions, and how they were answered")
    async def show(request: Request[Any, Any, Any], project: FromPath[str]) -> list[dict[str, Any]]:
        desk.caller(request, Scope.ADMIN, project)  # who labels must not read the answers
        return await gold_questions(desk.clients.database, desk.project(project).name)

    @delete("/v1/projects/{project:str}/gold/{gold_id:str}", status_code=200, tags=["labels"], summary="Ask it no more")
    async def retire(request: Request[Any, Any, Any], project: FromPath[str], gold_id: FromPath[str]) -> dict[str, str]:
        desk.caller(request, Scope.ADMIN, project)
        await retire_gold(desk.clients.database, desk.project(project).name, gold_id)
        return {"retired": gold_id}

    return [add, show, retire]


def _list(raw: bytes) -> list[Any]:
    try:
        found = msgspec.json.decode(raw)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise MalformedBody(f"the body is not JSON in UTF-8: {error}") from None
    if not isinstance(found, list) or not found:
        raise InvalidGold([{"field": "body", "message": "must be a list of gold questions, at least one"}])
    return found


def _screen(desk: NightDesk) -> list[HTTPRouteHandler]:
    async def look(project: str, *, restore: bool) -> dict[str, Any]:
        settings, clients = desk.project(project), desk.clients
        row = await labelling_project(clients.database, clients.label_studio, settings.name, settings.labeling)
        return _view(await keep_screen(clients.database, clients.label_studio, row, restore=restore))

    @get("/v1/projects/{project:str}/labels/screen", tags=["labels"], summary="Whether the labelling screen is ours")
    async def show_screen(request: Request[Any, Any, Any], project: FromPath[str]) -> dict[str, Any]:
        desk.caller(request, Scope.READ, project)
        return await look(project, restore=False)

    @post("/v1/projects/{project:str}/labels/screen", status_code=200, tags=["labels"], summary="Put ours back")
    async def restore_screen(request: Request[Any, Any, Any], project: FromPath[str]) -> dict[str, Any]:
        desk.caller(request, Scope.ADMIN, project)
        return await look(project, restore=True)

    return [show_screen, restore_screen]


def _view(screen: Screen) -> dict[str, Any]:
    return {"state": screen.state, "missing": screen.missing, "detail": screen.detail, "cure": screen.cure}
