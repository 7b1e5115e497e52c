"""The pages that people open: each renders, with every kind of event, and shows nobody what a key may not see."""

from __future__ import annotations

from datetime import date
from pathlib import Path
from typing import Any

import httpx

from labeling.database import Database, now
from loop.tables import Night, NightEvent, NightState
from loop.watch.live import Live
from service.app import assemble, create_app
from service.routes.nights import NightDesk
from service.routes.pages import page_routes
from tests.running import NOWHERE, PROJECT, Service, offline_clients, serving, settings_for


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
    clients = offline_clients(database, tmp_path)
    projects = {project.name: project for project in settings.projects}
    desk = NightDesk(clients, projects, tmp_path, state.keys, Live(), lambda: None)
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
