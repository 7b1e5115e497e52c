"""Pages for people: what each project serves, its nights, a night's report. Log in with a key as the password.

A browser sends Basic credentials by itself, so nothing here changes anything: that takes the command line or MLflow.
"""

from __future__ import annotations

import base64
import binascii
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from litestar import MediaType, Request, Response, get
from litestar.handlers import HTTPRouteHandler
from markdown_it import MarkdownIt
from markupsafe import Markup

from labeling.queue_report import queue_report
from loop import night_view
from service.auth import Caller, Scope, Unauthenticated
from service.routes.nights import NightDesk

TEMPLATES = Environment(
    loader=FileSystemLoader(Path(__file__).parent.parent / "templates"), autoescape=True, undefined=StrictUndefined
)
# Reports quote prompts and answers, which anybody may have written: no HTML passes, and links are not made.
MARKDOWN = MarkdownIt("commonmark", {"html": False}).enable("table").disable(["link", "image", "autolink"])
HEADERS = {"Content-Security-Policy": "default-src 'none'; style-src 'unsafe-inline'", "Cache-Control": "no-store"}


def page_routes(desk: NightDesk) -> list[HTTPRouteHandler]:
    @get("/", media_type=MediaType.HTML, include_in_schema=False)
    async def overview(request: Request[Any, Any, Any]) -> Response[str]:
        caller = _caller(desk, request)
        if caller is None:
            return _log_in()
        names = [name for name in desk.projects if caller.sees(name)]
        database = desk.clients.database
        projects = [
            {**await night_view.project_view(database, name), "queue": await queue_report(database, name)}
            for name in names
        ]
        return _page("overview.html", projects=projects)

    @get("/pages/nights/{night_id:str}", media_type=MediaType.HTML, include_in_schema=False)
    async def night(request: Request[Any, Any, Any], night_id: str) -> Response[str]:
        caller = _caller(desk, request)
        if caller is None:
            return _log_in()
        caller.require(Scope.READ, (await desk.night(night_id)).project)
        view = await desk.view(night_id)
        return _page("night.html", night=view, report=Markup(MARKDOWN.render(view["report"] or "")))  # noqa: S704 - above

    return [overview, night]


def _caller(desk: NightDesk, request: Request[Any, Any, Any]) -> Caller | None:
    """Basic credentials, whose password is the key, or the key as any client sends it."""
    header = request.headers.get("authorization", "")
    try:
        if header.lower().startswith("basic "):
            header = "Bearer " + base64.b64decode(header[6:], validate=True).decode().partition(":")[2]
        caller = desk.keys.authenticate(header)
    except (Unauthenticated, binascii.Error, UnicodeDecodeError):
        return None
    return caller if caller.may(Scope.READ) else None


def _log_in() -> Response[str]:
    text = "Log in with an API key that has the scope read, as the password."
    headers = {**HEADERS, "WWW-Authenticate": 'Basic realm="Nightschool: any name, an API key as password"'}
    return Response(text, status_code=401, media_type=MediaType.TEXT, headers=headers)


def _page(template: str, **values: Any) -> Response[str]:
    return Response(TEMPLATES.get_template(template).render(**values), media_type=MediaType.HTML, headers=HEADERS)
