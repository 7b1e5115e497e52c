"""/v1/chat/completions, /v1/completions, /v1/models: the gateway's raw ASGI handlers."""

from __future__ import annotations

from litestar.handlers import ASGIRouteHandler

from service.gateway import Gateway


def completion_routes(gateway: Gateway) -> list[ASGIRouteHandler]:
    complete = ASGIRouteHandler(["/v1/chat/completions", "/v1/completions"], copy_scope=False)
    models = ASGIRouteHandler("/v1/models", copy_scope=False)
    return [complete(gateway.complete), models(gateway.models)]
