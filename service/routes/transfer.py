"""Import and export over HTTP: batches of lines in, a stream of lines out. For admin keys."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Mapping, Sequence
from typing import Annotated, Any

from litestar import Request, get, post
from litestar.handlers import HTTPRouteHandler
from litestar.params import FromPath, FromQuery, QueryParameter
from litestar.response import Stream

from labeling.database import Database
from labeling.errors import InvalidInput, NotFound
from labeling.reporters import Reporters
from labeling.unlinked import unlinked_feedback
from loop.settings import ProjectSettings
from service.auth import KeyRing, Scope
from service.transfer.exporting import chosen, exported
from service.transfer.lines import Format, format_named, rows_of
from service.transfer.reading import LineRefused, Options
from service.transfer.storing import Numbered, Outcome, store

NDJSON = "application/x-ndjson"
Many = FromQuery[list[str] | None]


class UnknownTransferProject(NotFound):
    code = "unknown_project"


class BadScale(InvalidInput):
    code = "bad_scale"
    default_hint = "Write NAME=WORST:BEST, such as stars=1:5; errors=10:0 counts the other way round."


def transfer_routes(
    database: Database, keys: KeyRing, reporters: Reporters, configured: Mapping[str, ProjectSettings]
) -> list[HTTPRouteHandler]:
    projects = tuple(configured)

    @post("/v1/import", status_code=200, tags=["transfer"], summary="A batch of lines of a file to import")
    async def import_lines(
        request: Request[Any, Any, Any],
        project: FromQuery[str | None] = None,
        form: Annotated[str | None, QueryParameter(name="format")] = None,
        first_line: FromQuery[int] = 1,
        dry_run: FromQuery[bool] = False,
        scale: Many = None,
        skip: Many = None,
    ) -> dict[str, Any]:
        """Without a project, rows of an export stay in theirs."""
        caller = keys.authenticate(request.headers.get("authorization"))
        caller.require(Scope.ADMIN, project or None)
        if project and project not in projects:
            raise UnknownTransferProject(f"no project {project!r}", hint=f"Configured: {', '.join(projects)}.")
        into = project or caller.project or ""
        only = projects[0] if len(projects) == 1 else ""
        known_scales = metric_scales(configured[into or only]) if into or only else {}
        scales = known_scales | scales_of(scale or ())
        options = Options(into or only, into, scales, frozenset(skip or ()), reporters)
        body, known = await request.body(), format_named(form)
        # In a thread: requests of apps are not to wait for a megabyte of JSON.
        rows, outcome = await asyncio.to_thread(_read, body, known, options, first_line, projects)
        await store(database, rows, outcome, project=into, dry_run=dry_run)
        return {
            "stored": dict(outcome.stored),
            "duplicates": dict(outcome.duplicates),
            "left_out": outcome.left_out,
            "refused": [{"line": line, "reason": reason} for line, reason in sorted(outcome.refused)],
        }

    @get("/v1/export", media_type=NDJSON, tags=["transfer"], summary="Everything that is known, as JSON lines")
    async def export_lines(
        request: Request[Any, Any, Any], project: FromQuery[str | None] = None, table: Many = None
    ) -> Stream:
        caller = keys.authenticate(request.headers.get("authorization"))
        caller.require(Scope.ADMIN, project)
        return Stream(exported(database, chosen(table or ()), project or caller.project), media_type=NDJSON)

    @get(
        "/v1/projects/{project:str}/feedback/unlinked",
        tags=["feedback"],
        summary="Feedback whose exchange never came, the oldest first",
    )
    async def show_unlinked(
        request: Request[Any, Any, Any],
        project: FromPath[str],
        limit: Annotated[int, QueryParameter(ge=1, le=1000)] = 100,
    ) -> dict[str, Any]:
        caller = keys.authenticate(request.headers.get("authorization"))
        caller.require(Scope.READ, project)
        if project not in projects:
            raise UnknownTransferProject(f"no project {project!r}", hint=f"Configured: {', '.join(projects)}.")
        return await unlinked_feedback(database, project, limit)

    return [import_lines, export_lines, show_unlinked]


def metric_scales(project: ProjectSettings) -> dict[str, tuple[float, float]]:
    """Of the metrics whose range the settings have."""
    metrics = project.labeling.metrics.items()
    return {name: (m.high, m.low) if m.optimize == "min" else (m.low, m.high) for name, m in metrics}


def scales_of(given: Sequence[str]) -> dict[str, tuple[float, float]]:
    """NAME=WORST:BEST each."""
    found: dict[str, tuple[float, float]] = {}
    for one in given:
        name, equals, ends = one.rpartition("=")
        worst, _, best = ends.partition(":")
        try:
            found[name] = (float(worst), float(best))
        except ValueError:
            raise BadScale(f"{one!r} is no scale") from None
        if not name or not equals or found[name][0] == found[name][1] or not all(map(math.isfinite, found[name])):
            raise BadScale(f"{one!r} is no scale")
    return found


def _read(
    body: bytes, known: Format | None, options: Options, first_line: int, projects: tuple[str, ...]
) -> tuple[list[Numbered], Outcome]:
    rows: list[Numbered] = []
    outcome = Outcome()
    for number, line in enumerate(body.removesuffix(b"\n").split(b"\n"), first_line):
        if not line.strip():
            continue
        try:
            found = rows_of(line, known, options)
            foreign = {p for row in found if (p := getattr(row, "project", None)) is not None} - set(projects)
            if foreign:
                named = ", ".join(sorted(foreign))
                raise LineRefused(f"no project {named!r} in the settings" if named else "which project? Name one")
        except LineRefused as refusal:
            outcome.refused.append((number, str(refusal)))
            continue
        outcome.left_out += not found
        rows += [(number, row) for row in found]
    return rows, outcome
