"""What the loop relies on, shown on the real MLflow server through the skinny client."""

from __future__ import annotations

import os
import secrets
import time
from pathlib import Path
from typing import Any

import httpx
import pytest

from loop.mlflow_registry import Registry, RegistryRefused, RegistryUnavailable
from loop.settings import MlflowSettings
from tests.adapters import TINY, write_adapter
from tests.running import serving

BASE = {"base_digest": "sha256:base", "base_name": "base"}


@pytest.fixture
def registry(mlflow_server: Any) -> Registry:
    return Registry(MlflowSettings(url=mlflow_server.url))


@pytest.fixture
async def project(registry: Registry) -> str:
    """With version 1, the base."""
    name = f"bot-{secrets.token_hex(4)}"
    await registry.ensure_model(name, **BASE)
    return name


@pytest.fixture
def adapter_dir(tmp_path: Path) -> Path:
    return write_adapter(tmp_path / "adapter", TINY)


async def registered(registry: Registry, project: str, folder: Path, night: str = "ni_1", digest: str = "d1") -> int:
    run = await registry.start_run(project, night, night, {})
    tags = {"nightschool.adapter_digest": digest}
    return await registry.register(project, run, folder, night_id=night, tags=tags, description="# Night")


async def test_version_1_is_the_base(registry: Registry, project: str) -> None:
    """Made once with `production` on it; again changes nothing, another base is refused."""
    for _ in range(2):
        await registry.ensure_model(project, **BASE)
    first = await registry.version_info(project, 1)
    assert first is not None
    assert first.tags["nightschool.kind"] == "base"
    assert await registry.version_info(project, 2) is None
    assert await registry.aliases(project) == {"production": 1}
    with pytest.raises(RegistryRefused, match="not this base"):
        await registry.ensure_model(project, base_digest="sha256:other", base_name="base")


async def test_a_restart_does_not_move_production(registry: Registry, project: str, adapter_dir: Path) -> None:
    """ensure_model runs at each start: an alias that was moved, or removed, meanwhile stays as it is."""
    version = await registered(registry, project, adapter_dir)
    await registry.set_alias(project, "production", version)
    await registry.ensure_model(project, **BASE)
    assert await registry.aliases(project) == {"production": version}
    await registry.delete_alias(project, "production")
    await registry.ensure_model(project, **BASE)
    assert await registry.aliases(project) == {}


async def test_a_foreign_model_of_that_name_is_refused(registry: Registry, mlflow_server: Any) -> None:
    """Its version 1 is not ours, and nothing of it is touched."""
    name = f"foreign-{secrets.token_hex(4)}"
    async with httpx.AsyncClient(base_url=mlflow_server.url) as http:
        for path, body in (("registered-models", {"name": name}), ("model-versions", {"name": name, "source": "x:/y"})):
            (await http.post(f"/api/2.0/mlflow/{path}/create", json=body)).raise_for_status()
    with pytest.raises(RegistryRefused, match=name):
        await registry.ensure_model(name, **BASE)


async def test_an_adapter_is_registered_once_a_night(registry: Registry, project: str, adapter_dir: Path) -> None:
    """A call whose answer was lost is found again; other bytes of the same night are another version."""
    first = await registered(registry, project, adapter_dir)
    assert first == 2
    assert await registered(registry, project, adapter_dir) == first
    assert await registered(registry, project, adapter_dir, digest="d2") == 3
    assert await registered(registry, project, adapter_dir, night="ni_2") == 4
    assert [found.version for found in await registry.versions_of_night(project, "ni_1")] == [2, 3]


async def test_a_version_carries_tags_description_and_files(
    registry: Registry, project: str, adapter_dir: Path, mlflow_server: Any
) -> None:
    """What the on-call reads; a description longer than MLflow's column is cut, not refused."""
    version = await registered(registry, project, adapter_dir)
    await registry.set_tags(project, version, {"nightschool.decision": "passed"})
    await registry.set_description(project, version, "# Report\n" + "x" * 9000)
    found = await registry.version_info(project, version)
    assert found is not None
    assert found.tags["nightschool.decision"] == "passed"
    assert found.tags["nightschool.night"] == "ni_1"
    assert found.description.startswith("# Report")
    assert len(found.description) <= 5000
    async with httpx.AsyncClient(base_url=mlflow_server.url) as http:
        query = {"run_id": found.run_id, "path": "adapter"}
        files = (await http.get("/api/2.0/mlflow/artifacts/list", params=query)).json()["files"]
    assert [Path(file["path"]).name for file in files] == ["adapter_config.json", "adapter_model.safetensors"]


async def test_curves_are_there_while_the_run_goes(registry: Registry, project: str, mlflow_server: Any) -> None:
    """Many steps at once, more than MLflow takes in a request; a killed attempt's run is not left as running."""
    killed = await registry.start_run(project, "ni_1", "first try", {"rank": "16"})
    run = await registry.start_run(project, "ni_1", "second try", {"long": "x" * 9000})
    await registry.log_metrics(run, {step: {"loss": 1.0 / (step + 1), "grad_norm": 0.5} for step in range(600)})
    async with httpx.AsyncClient(base_url=mlflow_server.url) as http:
        query = {"run_id": run, "metric_key": "loss", "max_results": "1000"}
        curve = (await http.get("/api/2.0/mlflow/metrics/get-history", params=query)).json()["metrics"]
        assert [row["step"] for row in curve] == list(range(600))
        assert [round(row["value"], 3) for row in curve[:3]] == [1.0, 0.5, 0.333]
        assert await status(http, killed) == "KILLED"
        assert await status(http, run) == "RUNNING"
        await registry.finish_run(run, tags={"nightschool.decision": "PROMOTED"})
        assert await status(http, run) == "FINISHED"


async def status(http: httpx.AsyncClient, run: str) -> str:
    answer = (await http.get("/api/2.0/mlflow/runs/get", params={"run_id": run})).json()
    return str(answer["run"]["info"]["status"])


async def test_aliases_move_and_go(registry: Registry, project: str, adapter_dir: Path) -> None:
    """Verified after writing; removing what is gone is no error; a version that is not there is refused."""
    version = await registered(registry, project, adapter_dir)
    await registry.set_alias(project, "candidate", version)
    await registry.set_alias(project, "production", version)
    assert await registry.aliases(project) == {"candidate": version, "production": version}
    for _ in range(2):
        await registry.delete_alias(project, "candidate")
    assert await registry.aliases(project) == {"production": version}
    with pytest.raises(RegistryRefused, match="99"):
        await registry.set_alias(project, "production", 99)


async def test_what_is_missing_is_none_or_refused(registry: Registry, project: str) -> None:
    """Never "unavailable": trying again would not help."""
    assert await registry.version_info(project, 7) is None
    assert await registry.version_info("no-such-model", 1) is None
    with pytest.raises(RegistryRefused, match="no-such-model"):
        await registry.aliases("no-such-model")


async def test_a_server_that_is_down_is_unavailable_soon() -> None:
    """The client's own defaults would try for minutes."""
    registry = Registry(MlflowSettings(url="http://127.0.0.1:1", timeout_seconds=2))
    started = time.monotonic()
    with pytest.raises(RegistryUnavailable, match=r"127\.0\.0\.1:1"):
        await registry.check()
    assert time.monotonic() - started < 10


def answering(code: int, seen: list[dict[bytes, bytes]]) -> Any:
    """A server that gives every request the same status."""

    async def app(scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "lifespan":
            for step in ("startup", "shutdown"):
                await receive()
                await send({"type": f"lifespan.{step}.complete"})
            return
        seen.append(dict(scope["headers"]))
        await send({"type": "http.response.start", "status": code, "headers": [(b"content-type", b"text/plain")]})
        await send({"type": "http.response.body", "body": b"You are not authenticated."})

    return app


@pytest.mark.parametrize(
    ("code", "kind"),
    [(401, RegistryRefused), (403, RegistryRefused), (500, RegistryUnavailable), (503, RegistryUnavailable)],
)
async def test_the_servers_errors_are_told_apart(code: int, kind: type[Exception]) -> None:
    """Credentials are refused; a server in trouble is unavailable."""

    async with serving(answering(code, [])) as url:
        with pytest.raises(kind, match=url):
            await Registry(MlflowSettings(url=url, timeout_seconds=2)).check()


async def test_credentials_are_sent(mlflow_server: Any) -> None:
    """Basic authentication, as the settings say, and nowhere in a message."""
    seen: list[dict[bytes, bytes]] = []
    settings = MlflowSettings.model_validate(
        {"url": "", "username": "oncall", "password": "s3cret", "timeout_seconds": 2}
    )
    try:
        async with serving(answering(403, seen)) as url:
            with pytest.raises(RegistryRefused) as error:
                await Registry(settings, url=url).check()
    finally:
        for name in ("MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD"):
            os.environ.pop(name, None)
    assert seen[0][b"authorization"].startswith(b"Basic ")
    assert "s3cret" not in str(error.value)
