"""Label Studio's webhook comes in here. It gives a second and tries once, so the answer waits for nothing."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any

from litestar import Request, post
from litestar.handlers import HTTPRouteHandler
from litestar.params import FromPath

from labeling.label_studio import LabelStudioServer
from labeling.label_studio_webhook import HEADER, PATH, is_genuine
from service.auth import Unauthenticated
from service.metrics import Metrics


class ForgedHook(Unauthenticated):
    code = "forged_hook"
    default_hint = "Nightschool registers this webhook in Label Studio by itself, with its secret; it is not for apps."


def hook_routes(
    server: LabelStudioServer, projects: Collection[str], hint: Callable[[str], None], metrics: Metrics
) -> list[HTTPRouteHandler]:
    """The body is not read: what happened is asked of Label Studio."""

    @post(f"{PATH}/{{project:str}}", status_code=204, tags=["labels"], summary="Label Studio says: look for changes")
    async def label_studio_hook(request: Request[Any, Any, Any], project: FromPath[str]) -> None:
        genuine = is_genuine(server, project, request.headers.get(HEADER))
        if project not in projects or not genuine:
            metrics.hooks.labels("forged").inc()
            raise ForgedHook("the webhook's secret is missing or not the one of this project")
        metrics.hooks.labels("taken").inc()
        hint(project)

    return [label_studio_hook]
