"""API keys over HTTP, for `nightschool keys` while a process runs: create, list, revoke."""

from __future__ import annotations

from typing import Any

from litestar import Request, delete, get, post
from litestar.handlers import HTTPRouteHandler
from pydantic import Field

from labeling.database import Database
from labeling.errors import InvalidInput, Refused
from labeling.settings import Strict
from service import auth
from service.auth import Caller, KeyRing, Scope
from service.bodies import read_body


class UnknownKeyProject(InvalidInput):
    code = "unknown_key_project"


class KeyOutOfReach(Refused):
    code = "key_out_of_reach"
    default_hint = "Name that project, or use an admin key of every project."


class KeyBody(Strict):
    name: str = Field(min_length=1, max_length=100, pattern=r"^[^\x00-\x1f]+$")
    scopes: tuple[str, ...]
    project: str | None = None


def key_routes(database: Database, keys: KeyRing, projects: tuple[str, ...]) -> list[HTTPRouteHandler]:
    @post("/v1/keys", tags=["keys"], summary="Make a key; it is shown this once")
    async def create(request: Request[Any, Any, Any]) -> dict[str, Any]:
        caller = keys.authenticate(request.headers.get("authorization"))
        caller.require(Scope.ADMIN)
        body = await read_body(request, KeyBody)
        _within(caller, body.project)
        if body.project is not None and body.project not in projects:
            raise UnknownKeyProject(f"no project {body.project!r}", hint=f"Configured: {', '.join(projects)}.")
        key_id, key = await auth.create_key(database, body.name, body.scopes, body.project)
        await keys.load(database)
        return {"id": key_id, "key": key, "name": body.name, "scopes": list(body.scopes), "project": body.project}

    @get("/v1/keys", tags=["keys"], summary="Names, scopes and ages; never the keys")
    async def show(request: Request[Any, Any, Any]) -> list[dict[str, Any]]:
        caller = keys.authenticate(request.headers.get("authorization"))
        caller.require(Scope.ADMIN)
        rows = [row for row in await auth.list_keys(database) if caller.project in {None, row.project}]
        return [row.model_dump(mode="json", exclude={"hash"}) for row in rows]

    @delete("/v1/keys/{key_id:str}", status_code=200, tags=["keys"], summary="End a key now")
    async def revoke(request: Request[Any, Any, Any], key_id: str) -> dict[str, str]:
        caller = keys.authenticate(request.headers.get("authorization"))
        caller.require(Scope.ADMIN)
        if caller.project is not None:
            _within(caller, next((row.project for row in await auth.list_keys(database) if row.id == key_id), None))
        await auth.revoke_key(database, key_id)
        await keys.load(database)
        return {"revoked": key_id}

    return [create, show, revoke]


def _within(caller: Caller, project: str | None) -> None:
    """A project's own admin key reaches that project's keys only, never one of every project."""
    if caller.project is not None and project != caller.project:
        raise KeyOutOfReach(f"this key administers project {caller.project!r} alone")
