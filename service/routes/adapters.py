"""GET /v1/models/{name}/current: what an alias stands for now, for apps that talk to vLLM themselves."""

from __future__ import annotations

from typing import Any

from litestar import Request, get
from litestar.handlers import HTTPRouteHandler
from litestar.params import FromPath

from service.alias_table import AliasTable
from service.auth import KeyRing, Scope


def adapter_routes(aliases: AliasTable, keys: KeyRing) -> list[HTTPRouteHandler]:
    @get("/v1/models/{name:str}/current", tags=["models"], summary="What an alias serves now")
    async def show_current(request: Request[Any, Any, Any], name: FromPath[str]) -> dict[str, Any]:
        caller = keys.authenticate(request.headers.get("authorization"))
        if not caller.may(Scope.READ):
            caller.require(Scope.INFERENCE)
        return aliases.describe(name, caller)

    return [show_current]
