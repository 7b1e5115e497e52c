"""/health, /ready and /metrics: for load balancers, orchestrators and Prometheus; they need no key."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from litestar import Response, get
from litestar.handlers import HTTPRouteHandler

from labeling.database import Database
from service.health import Check, database_check, readiness
from service.metrics import Metrics


def health_routes(
    database: Database, replicas: Mapping[str, Check], checks: Mapping[str, Check], metrics: Metrics
) -> list[HTTPRouteHandler]:
    @get("/health", tags=["health"], summary="The process is alive")
    async def health() -> dict[str, str]:
        return {"status": "alive"}

    @get("/ready", tags=["health"], summary="Each dependency; 503 without the database or any replica")
    async def ready() -> Response[dict[str, Any]]:
        found = await readiness(database_check(database), replicas, checks)
        return Response(found.as_dict(), status_code=200 if found.ready else 503)

    @get("/metrics", include_in_schema=False)
    async def figures() -> Response[bytes]:
        body, media_type = metrics.render()
        return Response(body, media_type=media_type)

    return [health, ready, figures]
