"""/v1/chat/completions, /v1/completions, /v1/models: the gateway, as raw ASGI handlers where it counts."""

from __future__ import annotations

from typing import Any

from litestar import Request, Response, get
from litestar.handlers import ASGIRouteHandler, HTTPRouteHandler
from litestar.params import FromPath

from service.gateway import Gateway


def completion_routes(gateway: Gateway) -> list[ASGIRouteHandler | HTTPRouteHandler]:
    complete = ASGIRouteHandler(["/v1/chat/completions", "/v1/completions"], copy_scope=False)
    models = ASGIRouteHandler("/v1/models", copy_scope=False)

    @get("/v1/models/{name:str}", tags=["models"], summary="One alias, in OpenAI's form")
    async def show_model(request: Request[Any, Any, Any], name: FromPath[str]) -> Response[bytes]:
        status, body = gateway.model(request.headers.get("authorization"), name)
        return Response(body, status_code=status, media_type="application/json")

    return [complete(gateway.complete), models(gateway.models), show_model]
