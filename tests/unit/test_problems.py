"""Every error that we raise has its status; outside the OpenAI routes each answer is an RFC 9457 problem."""

from __future__ import annotations

import importlib
import pkgutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from litestar import get
from litestar.handlers import HTTPRouteHandler

import labeling
import loop
import service
from labeling.database import Database
from labeling.errors import Conflict, InvalidInput, NightschoolError, NotFound, Refused, Unavailable
from service.metrics import Metrics
from service.problems import STATUS, status_of
from tests.running import service as running_service
from tests.running import settings_for

# Run in processes of their own, for what they import; and Alembic's own script.
APART = ("loop.trainers.", "loop.lm_eval_child", "loop.vllm_cpu_worker", "service.migrations.")
BRANCHES = (InvalidInput, NotFound, Conflict, Refused, Unavailable)
# Where errors of no branch may stand: they end a stage or a command, never a request.
NOT_HTTP = ("loop.", "service.bench.", "service.commands.")
UNWANTED = ("torch", "transformers", "vllm", "mlflow", "label_studio_sdk", "peft", "trl", "datasets")


def modules() -> Iterator[str]:
    for package in (labeling, loop, service):
        for found in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
            if not found.name.startswith(APART):
                yield found.name


def subclasses(kind: type[NightschoolError]) -> Iterator[type[NightschoolError]]:
    for child in kind.__subclasses__():
        yield child
        yield from subclasses(child)


def test_every_error_has_its_status() -> None:
    """What a request can meet never falls through to 500; retryable is 503, and only retryable is 503."""
    for name in modules():
        importlib.import_module(name)
    found = [kind for kind in subclasses(NightschoolError) if not kind.__module__.startswith("tests")]
    assert len(found) > 20
    for kind in found:
        assert kind.code != NightschoolError.code, kind
        if issubclass(kind, BRANCHES):
            assert status_of(kind) in {400, 401, 403, 404, 409, 413, 415, 422, 503}, kind
            assert (status_of(kind) == 503) == kind.retryable == issubclass(kind, Unavailable), kind
        else:
            assert kind.__module__.startswith(NOT_HTTP), f"{kind} derives from none of the five branches"
    assert set(STATUS) <= {NightschoolError, *found}


def test_import_of_the_service_is_light() -> None:
    """The HTTP process never imports torch or a vendor's heavy SDK by importing the application."""
    check = f"import sys, service.app; print([m for m in {UNWANTED!r} if m in sys.modules])"
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, check=True, cwd=root)
    assert done.stdout.strip() == "[]"


@pytest.fixture
async def database(tmp_path: Path) -> Any:
    found = Database(f"sqlite+aiosqlite:///{tmp_path / 'n.db'}")
    await found.create_tables()
    yield found
    await found.close()


def broken_route() -> HTTPRouteHandler:
    @get("/broken")
    async def broken() -> None:
        raise ValueError("password=hunter2")

    return broken


async def test_every_answer_is_a_problem(database: Database) -> None:
    """Unknown path, wrong method, no key, and an error of ours that shows nothing of its inside."""
    async with (
        running_service(database, settings_for([]), extra_routes=[broken_route()]) as running,
        httpx.AsyncClient(base_url=running.url) as client,
    ):
        for method, path, status in (
            ("GET", "/nowhere", 404),
            ("DELETE", "/v1/feedback", 405),
            ("POST", "/v1/feedback", 401),
            ("GET", "/v1/feedback/x", 401),
            ("GET", "/broken", 500),
        ):
            answer = await client.request(method, path)
            problem = answer.json()
            assert (answer.status_code, problem["status"]) == (status, status), path
            assert answer.headers["content-type"] == "application/problem+json"
            assert {"type", "title", "status", "code", "detail"} <= set(problem)
            assert "hunter2" not in answer.text
        assert (await client.post("/v1/feedback")).headers["www-authenticate"] == "Bearer"


async def test_health_needs_no_key_and_ready_tells_each(database: Database) -> None:
    """Alive without any engine, not ready without one; figures and the OpenAPI form are there."""
    async with (
        running_service(database, settings_for(["http://127.0.0.1:9"])) as running,
        httpx.AsyncClient(base_url=running.url) as client,
    ):
        assert (await client.get("/health")).status_code == 200
        ready = await client.get("/ready")
        assert ready.status_code == 503
        assert [check["ok"] for check in ready.json()["checks"]] == [True, False]
        assert "nightschool_capture_waiting 0.0" in (await client.get("/metrics")).text
        form = (await client.get("/schema/openapi.json")).json()
        body = form["paths"]["/v1/feedback"]["post"]["requestBody"]["content"]["application/json"]["schema"]
        one, many = body["oneOf"]
        assert {"kind", "exchange_id", "value"} <= set(one["properties"])
        assert many["items"] == one
        assert "://" not in (await client.get("/schema")).text.replace("http://127", "")


def test_two_applications_share_no_figures() -> None:
    """Each application counts for itself."""
    first, second = Metrics(), Metrics()
    first.captured.inc()
    assert second.registry.get_sample_value("nightschool_captured_exchanges_total") == 0


async def test_lifespan_of_others_runs_inside_ours(database: Database) -> None:
    """Jobs beside the data plane start after it and end before it."""
    seen: list[str] = []

    class Jobs:
        def __init__(self, _: Any) -> None: ...

        async def __aenter__(self) -> None:
            seen.append("started")

        async def __aexit__(self, *_: object) -> None:
            seen.append("ended")

    async with running_service(database, settings_for([]), lifespan=[Jobs]):
        assert seen == ["started"]
    assert seen == ["started", "ended"]
