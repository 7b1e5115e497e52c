"""Composes the HTTP application from its settings and its parts. Nothing happens at import.

The data plane (gateway, feedback) and its writers start here; nights, polls and pages come as `lifespan` and
`extra_routes` from whoever runs the process.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import structlog
from litestar import Litestar
from litestar.openapi import OpenAPIConfig
from litestar.openapi.plugins import JsonRenderPlugin, YamlRenderPlugin
from litestar.types import ControllerRouterHandler

from labeling.database import Database
from labeling.errors import NightschoolError
from labeling.reporters import Reporters
from labeling.retention import retention_counts
from service.alias_table import AliasTable, Upstream
from service.auth import KeyRing
from service.capture import CaptureQueue
from service.feedback_desk import FeedbackDesk
from service.gateway import Gateway
from service.health import Check
from service.idempotency import forget_answers
from service.ingest import IngestWriter
from service.metrics import Metrics
from service.problems import HANDLERS
from service.routes.adapters import adapter_routes
from service.routes.completions import completion_routes
from service.routes.feedback import feedback_routes
from service.routes.health import health_routes
from service.routes.tensorzero import tensorzero_routes
from service.settings import Settings
from service.upstream import Replicas

log = structlog.get_logger(__name__)
ALIASES_SECONDS = 1.0
KEYS_SECONDS = 10.0
FORGET_SECONDS = 3600.0
RETENTION_SECONDS = 30.0
STOP_SECONDS = 5.0

Lifespan = Callable[[Litestar], AbstractAsyncContextManager[None]]


@dataclass(frozen=True)
class AppState:
    """The parts that the HTTP side and the jobs beside it share. `checks` are /ready's, by name."""

    database: Database
    aliases: AliasTable
    keys: KeyRing
    capture: CaptureQueue
    ingest: IngestWriter
    reporters: Reporters
    metrics: Metrics
    checks: Mapping[str, Check] = field(default_factory=dict)


def assemble(
    settings: Settings,
    database: Database,
    replica_urls: Sequence[str] | None = None,
    checks: Mapping[str, Check] | None = None,
) -> AppState:
    """`replica_urls` where the replicas are not the configured ones: managed engines have theirs once started."""
    urls = [replica.url for replica in settings.vllm.replicas] if replica_urls is None else replica_urls
    key = settings.vllm.api_key.get_secret_value() if settings.vllm.api_key else None
    metrics = Metrics()
    state = AppState(
        database=database,
        aliases=AliasTable(settings.projects, [Upstream(url.rstrip("/"), key) for url in urls]),
        keys=KeyRing(),
        capture=CaptureQueue(settings.http.capture_queue, metrics),
        ingest=IngestWriter(database, settings.http.ingest_queue, metrics),
        reporters=Reporters(),
        metrics=metrics,
        checks=checks or {},
    )
    metrics.gauge("capture_waiting", "Exchanges waiting to be stored", state.capture.waiting)
    metrics.gauge("ingest_waiting", "Feedback waiting for its commit", state.ingest.waiting)
    return state


def create_app(
    settings: Settings,
    state: AppState,
    *,
    extra_routes: Sequence[ControllerRouterHandler] = (),
    lifespan: Sequence[Lifespan] = (),
) -> Litestar:
    """The state must belong to this application alone; the database has its tables already."""
    aliases, keys = state.aliases, state.keys
    replicas = Replicas(aliases, state.metrics, settings.http.upstream_timeout_seconds)
    gateway = Gateway(aliases, replicas, keys, state.capture, state.metrics, settings.http.max_body_bytes)
    desk = FeedbackDesk(state.ingest, keys, state.reporters, tuple(aliases.projects), settings.http.max_body_bytes)
    engines = {f"vllm {upstream.url}": partial(replicas.check, upstream) for upstream in aliases.upstreams}
    routes: list[ControllerRouterHandler] = [
        *completion_routes(gateway),
        *feedback_routes(state.database, desk),
        *tensorzero_routes(desk, {project.name: project.labeling.metrics for project in settings.projects}),
        *adapter_routes(aliases, keys),
        *health_routes(state.database, engines, state.checks, state.metrics),
        *extra_routes,
    ]
    return Litestar(
        routes,
        lifespan=[partial(_data_plane, state, replicas), *lifespan],
        exception_handlers=HANDLERS,
        request_max_body_size=settings.http.max_body_bytes,
        openapi_config=OpenAPIConfig(
            title="Nightschool",
            version="1",
            path="/schema",
            render_plugins=[JsonRenderPlugin(path="/"), YamlRenderPlugin()],
        ),
        logging_config=None,
    )


@asynccontextmanager
async def _data_plane(state: AppState, replicas: Replicas, _: Litestar) -> AsyncIterator[None]:
    """Loads aliases and keys, runs the writers, and at the end lets them store what was taken in."""
    await state.keys.load(state.database)
    await state.aliases.load(state.database)
    await state.reporters.load(state.database, state.aliases.projects)
    jobs: list[Coroutine[Any, Any, None]] = [
        state.ingest.run(),
        state.capture.run(state.database),
        _again(ALIASES_SECONDS, lambda: state.aliases.load(state.database)),
        _again(KEYS_SECONDS, lambda: state.keys.load(state.database)),
        _again(FORGET_SECONDS, lambda: forget_answers(state.database)),
        _again(RETENTION_SECONDS, lambda: _show_retention(state)),
    ]
    tasks = [asyncio.create_task(job) for job in jobs]
    try:
        yield
    finally:
        await _drain(state)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await replicas.close()


async def _again(seconds: float, load: Callable[[], Coroutine[Any, Any, None]]) -> None:
    """With the database down, what was read last goes on serving."""
    while True:
        await asyncio.sleep(seconds)
        try:
            await load()
        except NightschoolError as error:
            log.warning("not_refreshed", error=str(error))
        except Exception:  # the edge of a task that nobody awaits: dead, it would leave an old alias serving
            log.exception("not_refreshed")


async def _show_retention(state: AppState) -> None:
    """Another process may be the one that deletes: its counts stand in the database."""
    for row in await retention_counts(state.database):
        state.metrics.exchanges_deleted.labels(row.project).set(row.deleted)
        state.metrics.exchanges_needed.labels(row.project).set(row.needed)


async def _drain(state: AppState) -> None:
    try:
        async with asyncio.timeout(STOP_SECONDS):
            await asyncio.gather(state.ingest.drained(), state.capture.drained())
    except TimeoutError:
        log.warning("not_drained", capture=state.capture.waiting(), ingest=state.ingest.waiting())
