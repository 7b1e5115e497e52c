"""The pages that people open: each renders, with every kind of event, and shows nobody what a key may not see."""

from __future__ import annotations

from datetime import date
from pathlib import Path
from typing import Any

import httpx

from labeling.database import Database, now
from labeling.label_studio import LabelStudioServer
from loop.aliases import NoGateway
from loop.clients import Clients
from loop.executors import LocalExecutor
from loop.mlflow_registry import Registry
from loop.object_store import open_store
from loop.settings import MlflowSettings, ObjectStoreSettings
from loop.tables import Night, NightEvent, NightState
from service.app import assemble, create_app
from service.routes.nights import NightDesk
from service.routes.pages import page_routes
from tests.running import PROJECT, Service, serving, settings_for

NOWHERE = "http://127.0.0.1:9"


async def test_overview_and_night_render(database: Database, tmp_path: Path) -> None:
    """State, stage and hostile text; without a key there is only the log-in."""
    settings = settings_for([NOWHERE], data_dir=tmp_path)
    state = assemble(settings, database)
    night = Night(project=PROJECT, date=date(2026, 1, 1), due_at=now(), state=NightState.FAILED, reason="<script>no")
    events: dict[str, dict[str, Any]] = {"state": {"to": "running"}, "stage_started": {"stage": "train"}}
    async with database.write() as session:
        session.add(night)
        await session.flush()
        session.add_all(NightEvent(night_id=night.id, kind=kind, detail=detail) for kind, detail in events.items())
    clients = Clients(
        database=database,
        label_studio=LabelStudioServer(NOWHERE, "unused"),
        registry=Registry(MlflowSettings(url=NOWHERE)),
        objects=open_store(ObjectStoreSettings(), tmp_path / "archive"),
        executor=LocalExecutor(),
        replicas=(),
        aliases=NoGateway(),
    )
    projects = {project.name: project for project in settings.projects}
    desk = NightDesk(clients, projects, tmp_path, state.keys, {}, lambda: None)
    async with serving(create_app(settings, state, extra_routes=page_routes(desk))) as url:
        key = await Service(url, settings, state).key("read")
        async with httpx.AsyncClient(base_url=url, auth=("anyone", key), trust_env=False) as http:
            overview, page = await http.get("/"), await http.get(f"/pages/nights/{night.id}")
        async with httpx.AsyncClient(base_url=url, trust_env=False) as http:
            assert (await http.get(f"/pages/nights/{night.id}")).status_code == 401
    assert overview.status_code == 200, overview.text
    assert page.status_code == 200, page.text
    assert f"/pages/nights/{night.id}" in overview.text
    assert "running" in page.text
    assert "train" in page.text
    assert "<script>" not in page.text
    await clients.label_studio.close()
