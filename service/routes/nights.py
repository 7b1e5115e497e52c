"""Nights and projects over HTTP: claim, watch, resume, approve, refuse, roll back, and labels held back."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import date as Date
from datetime import datetime
from pathlib import Path
from typing import Any

from litestar import Request, get, post
from litestar.handlers import HTTPRouteHandler
from pydantic import Field

from labeling.archive import archived_tasks
from labeling.database import now
from labeling.errors import Conflict
from labeling.settings import Strict
from loop import held_labels, night_view, promotion, schedule
from loop.clients import Clients
from loop.settings import ProjectSettings
from loop.states import WrongState
from loop.tables import Night, NightState
from loop.watch.live import Live
from service.auth import Caller, KeyRing, Scope
from service.bodies import read_body


class NightExists(Conflict):
    code = "night_exists"
    default_hint = (
        "One night per project and date: `nightschool night run --resume` continues a failed or skipped one, "
        "`--date` names another day."
    )


RESUMABLE = (NightState.FAILED, NightState.SKIPPED, NightState.CLAIMED, NightState.RUNNING)


class ClaimBody(Strict):
    project: str
    date: Date | None = None  # default: the latest due date
    recipe: dict[str, Any] = Field(default_factory=dict)


class WhyBody(Strict):
    why: str = ""


class RollBackBody(Strict):
    to: str | None = None
    why: str = ""


class ConfirmBody(Strict):
    label_ids: tuple[str, ...]


@dataclass(frozen=True)
class NightDesk:
    """What the handlers need. `wake` tells a worker in this process, where there is one, to look at the database."""

    clients: Clients
    projects: Mapping[str, ProjectSettings]
    data_dir: Path
    keys: KeyRing
    live: Live
    wake: Callable[[], None]

    def caller(self, request: Request[Any, Any, Any], scope: Scope, project: str | None = None) -> Caller:
        caller = self.keys.authenticate(request.headers.get("authorization"))
        caller.require(scope, project)
        return caller

    def project(self, name: str) -> ProjectSettings:
        if name not in self.projects:
            raise UnknownProject(f"no project {name!r}", hint=f"Configured: {', '.join(self.projects)}.")
        return self.projects[name]

    async def night(self, night_id: str) -> Night:
        async with self.clients.database.read() as session:
            return await night_view.get_night(session, night_id)

    async def view(self, night_id: str) -> dict[str, Any]:
        return await night_view.night_view(self.clients.database, self.data_dir, night_id, self.live.get(night_id))


class UnknownProject(night_view.UnknownNight):
    code = "unknown_project"


def night_routes(desk: NightDesk) -> list[HTTPRouteHandler]:
    return [*_watching(desk), *_running(desk), *_deciding(desk), *_labels(desk)]


def _watching(desk: NightDesk) -> list[HTTPRouteHandler]:
    @get("/v1/projects/{project:str}", tags=["nights"], summary="What a project serves, and what waits")
    async def show_project(request: Request[Any, Any, Any], project: str) -> dict[str, Any]:
        desk.caller(request, Scope.READ, project)
        return await night_view.project_view(desk.clients.database, desk.project(project).name)

    @get("/v1/nights", tags=["nights"], summary="The newest nights")
    async def list_nights(
        request: Request[Any, Any, Any], project: str | None = None, limit: int = 20
    ) -> list[dict[str, Any]]:
        caller = desk.caller(request, Scope.READ, project)
        async with desk.clients.database.read() as session:
            nights = await night_view.newest(session, project or caller.project, limit=max(1, min(limit, 200)))
        return [night.model_dump(mode="json") for night in nights]

    @get("/v1/nights/{night_id:str}", tags=["nights"], summary="One night: stages, evidence, report")
    async def show_night(request: Request[Any, Any, Any], night_id: str) -> dict[str, Any]:
        desk.caller(request, Scope.READ, (await desk.night(night_id)).project)
        return await desk.view(night_id)

    return [show_project, list_nights, show_night]


def _running(desk: NightDesk) -> list[HTTPRouteHandler]:
    @post("/v1/nights", tags=["nights"], summary="Claim a night as the scheduler does")
    async def claim_night(request: Request[Any, Any, Any]) -> dict[str, Any]:
        body = await read_body(request, ClaimBody)
        desk.caller(request, Scope.ADMIN, body.project)
        project = desk.project(body.project)
        due = schedule.latest_due(project.schedule, now())
        if body.date is not None:
            due = datetime.combine(body.date, project.schedule.at, tzinfo=project.schedule.zone)
        night_id = await schedule.claim(desk.clients.database, project, due.date(), due, body.recipe)
        if night_id is None:
            raise NightExists(f"project {project.name!r} has its night of {due.date()} already")
        desk.wake()
        return await desk.view(night_id)

    @post(
        "/v1/nights/{night_id:str}/resume",
        status_code=200,
        tags=["nights"],
        summary="Continue one that ended early",
    )
    async def resume_night(request: Request[Any, Any, Any], night_id: str) -> dict[str, Any]:
        night = await desk.night(night_id)
        desk.caller(request, Scope.ADMIN, night.project)
        if night.state not in RESUMABLE:
            raise WrongState(
                f"night {night_id} is {night.state}; only a FAILED, SKIPPED or interrupted one can be resumed"
            )
        await schedule.reopen(desk.clients.database, night_id)
        desk.wake()
        return await desk.view(night_id)

    return [claim_night, resume_night]


def _deciding(desk: NightDesk) -> list[HTTPRouteHandler]:
    @post("/v1/nights/{night_id:str}/approve", status_code=202, tags=["nights"], summary="Promote its candidate")
    async def approve_night(request: Request[Any, Any, Any], night_id: str) -> dict[str, Any]:
        night = await desk.night(night_id)
        caller = desk.caller(request, Scope.APPROVE, night.project)
        body = await read_body(request, WhyBody)
        await promotion.approve(desk.clients, desk.project(night.project), night_id, by=caller.name, why=body.why)
        desk.wake()
        return await desk.view(night_id)

    @post("/v1/nights/{night_id:str}/refuse", status_code=200, tags=["nights"], summary="Decline its candidate")
    async def refuse_night(request: Request[Any, Any, Any], night_id: str) -> dict[str, Any]:
        night = await desk.night(night_id)
        caller = desk.caller(request, Scope.APPROVE, night.project)
        body = await read_body(request, WhyBody)
        await promotion.refuse(desk.clients, desk.project(night.project), night_id, by=caller.name, why=body.why)
        return await desk.view(night_id)

    @post("/v1/projects/{project:str}/rollback", status_code=200, tags=["nights"], summary="Serve the previous adapter")
    async def roll_back(request: Request[Any, Any, Any], project: str) -> dict[str, Any]:
        caller = desk.caller(request, Scope.APPROVE, project)
        body = await read_body(request, RollBackBody)
        await promotion.roll_back(desk.clients, desk.project(project), by=caller.name, why=body.why, to=body.to)
        return await night_view.project_view(desk.clients.database, project)

    return [approve_night, refuse_night, roll_back]


def _labels(desk: NightDesk) -> list[HTTPRouteHandler]:
    @get("/v1/projects/{project:str}/labels/held", tags=["labels"], summary="Labels of rejected nights")
    async def show_held(request: Request[Any, Any, Any], project: str) -> list[dict[str, Any]]:
        desk.caller(request, Scope.READ, project)
        return await night_view.held_labels(desk.clients.database, desk.project(project).name)

    @post("/v1/projects/{project:str}/labels/confirm", status_code=200, tags=["labels"], summary="Let them train again")
    async def confirm_labels(request: Request[Any, Any, Any], project: str) -> dict[str, int]:
        desk.caller(request, Scope.APPROVE, project)
        body = await read_body(request, ConfirmBody)
        return {
            "confirmed": await held_labels.confirm(desk.clients.database, desk.project(project).name, body.label_ids)
        }

    @get("/v1/projects/{project:str}/labels/refused", tags=["labels"], summary="Labels with a mistake, and which")
    async def show_refused(request: Request[Any, Any, Any], project: str) -> list[dict[str, Any]]:
        desk.caller(request, Scope.READ, project)
        return await night_view.refused_labels(desk.clients.database, desk.project(project).name)

    @get("/v1/projects/{project:str}/labels/archived", tags=["labels"], summary="Tasks that left Label Studio, settled")
    async def show_archived(
        request: Request[Any, Any, Any], project: str, after: str = "", limit: int = 200
    ) -> list[dict[str, Any]]:
        desk.caller(request, Scope.READ, project)
        name = desk.project(project).name
        return await archived_tasks(desk.clients.database, name, after, max(1, min(limit, 1000)))

    return [show_held, confirm_labels, show_refused, show_archived]
