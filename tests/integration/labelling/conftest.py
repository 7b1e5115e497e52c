"""A desk at a real Label Studio."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from labeling.database import Database
from labeling.label_studio import LabelStudioServer
from labeling.tables import LabellingProject
from tests.fakes.label_studio import LabelStudioProxy, label_studio_proxy
from tests.integration.labelling.desk import Desk, MakeDesk
from tests.running import rows


@pytest.fixture
def database_url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if getattr(request, "param", "sqlite") == "postgres":
        return str(request.getfixturevalue("postgres_database"))
    return f"sqlite+aiosqlite:///{tmp_path / 'labels.db'}"


@pytest.fixture
async def server(label_studio: Any) -> AsyncIterator[LabelStudioServer]:
    server = LabelStudioServer(label_studio.url, label_studio.token)
    yield server
    await server.close()


@pytest.fixture
async def make_desk(database: Database, server: LabelStudioServer) -> AsyncIterator[MakeDesk]:
    yield lambda **settings: Desk(database, server, **settings)
    for row in await rows(database, LabellingProject):
        await server.delete_project(row.server_project)


@pytest.fixture
def desk(make_desk: MakeDesk) -> Desk:
    return make_desk()


@pytest.fixture
async def faulty(label_studio: Any) -> AsyncIterator[tuple[LabelStudioServer, LabelStudioProxy]]:
    async with label_studio_proxy(label_studio.url) as (url, proxy):
        server = LabelStudioServer(url, label_studio.token, timeout_seconds=2)
        yield server, proxy
        await server.close()
