"""Which engine name each alias stands for, the replicas that serve it, and how many requests name it right now.

In memory, so that inference survives the database; the `serving` table is read again every second.
"""

from __future__ import annotations

import re
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from sqlmodel import select

from labeling.database import Database
from labeling.errors import NotFound
from loop.settings import ProjectSettings
from loop.tables import Serving
from service.auth import Caller, Scope

REFUSED_SECONDS = 10.0  # how long a replica that refused a connection is asked last
IMMUTABLE = re.compile(r"(?P<project>[a-z0-9-]+)@v[1-9][0-9]*")


class UnknownModel(NotFound):
    code = "unknown_model"
    default_hint = "GET /v1/models lists the names that this key may use."


@dataclass(frozen=True)
class Upstream:
    """One vLLM: its root, without /v1, and its key."""

    url: str
    api_key: str | None = None


@dataclass(frozen=True, slots=True)
class Route:
    """What a requested model name means. `project` is None where the base was asked for by a key of every project."""

    requested: str
    served: str
    project: str | None
    is_alias: bool


class Flight:
    """One request between its name's look-up and its last byte."""

    def __init__(self, route: Route, count: Counter[tuple[str, str]]) -> None:
        self.route = route
        self._count = count
        self._place = ("", route.served)
        count[self._place] += 1

    def via(self, upstream: Upstream) -> None:
        self.land()
        self._place = (upstream.url, self.route.served)
        self._count[self._place] += 1

    def land(self) -> None:
        self._count[self._place] -= 1
        if not self._count[self._place]:
            del self._count[self._place]


class AliasTable:
    def __init__(self, projects: Sequence[ProjectSettings], upstreams: Sequence[Upstream]) -> None:
        self._projects = {project.name: project for project in projects}
        self._served = {project.name: project.base_name for project in projects}
        self._upstreams = tuple(upstreams)
        self._flights: Counter[tuple[str, str]] = Counter()
        self._refused: dict[str, float] = {}
        self._rows: dict[str, tuple[str, datetime]] = {}

    @property
    def projects(self) -> tuple[str, ...]:
        return tuple(self._projects)

    @property
    def upstreams(self) -> tuple[Upstream, ...]:
        return self._upstreams

    def current(self, project: str) -> str:
        """The engine's name for what the alias serves."""
        return self._served[project]

    def describe(self, alias: str, caller: Caller) -> dict[str, Any]:
        """For apps that talk to an engine themselves."""
        if alias not in self._projects or not caller.sees(alias):
            raise UnknownModel(f"no alias {alias!r}")
        served, base = self._served[alias], self._projects[alias].base_name
        version = 1 if served == base else int(served.rpartition("@v")[2])
        return {"alias": alias, "served": served, "version": version, "base": base}

    async def set(self, project: str, served: str) -> None:
        if project not in self._projects:
            raise UnknownModel(f"no project {project!r}")
        self._served[project] = served

    async def load(self, database: Database) -> None:
        """Takes over rows that changed since the last look: an old read must not undo a `set` made meanwhile."""
        async with database.read() as session:
            rows = (await session.execute(select(Serving))).scalars().all()
        for row in rows:
            seen = (row.current, row.updated_at)
            if row.project in self._projects and self._rows.get(row.project) != seen:
                self._rows[row.project] = seen
                self._served[row.project] = self._projects[row.project].served_name(row.current)

    @contextmanager
    def flight(self, model: str, caller: Caller) -> Iterator[Flight]:
        """Looks the name up and counts the request at once, so that a drain cannot miss it."""
        flight = Flight(self._route(model, caller), self._flights)
        try:
            yield flight
        finally:
            flight.land()

    def in_flight(self, served: str) -> int:
        return sum(count for (_, name), count in self._flights.items() if name == served)

    def replicas_for(self, project: str | None = None) -> list[Upstream]:
        """Every replica serves every project (one base): least in flight first, lately refusing ones last."""
        load: Counter[str] = Counter()
        for (url, _), count in self._flights.items():
            load[url] += count
        instant = time.monotonic()
        return sorted(self._upstreams, key=lambda u: (self._refused.get(u.url, 0.0) > instant, load[u.url]))

    def refused(self, upstream: Upstream) -> None:
        self._refused[upstream.url] = time.monotonic() + REFUSED_SECONDS

    def _route(self, model: str, caller: Caller) -> Route:
        if model in self._projects and caller.sees(model):
            return Route(model, self._served[model], model, is_alias=True)
        if caller.may(Scope.READ) and (route := self._immutable(model, caller)):
            return route
        raise UnknownModel(f"The model `{model}` does not exist.")

    def _immutable(self, model: str, caller: Caller) -> Route | None:
        match = IMMUTABLE.fullmatch(model)
        project = self._projects.get(match["project"]) if match else None
        if project is not None:
            visible = caller.sees(project.name)
            return Route(model, project.served_name(model), project.name, is_alias=False) if visible else None
        if model in {p.base_name for p in self._projects.values()}:
            only = next(iter(self._projects)) if len(self._projects) == 1 else None
            return Route(model, model, caller.project or only, is_alias=False)
        return None
