"""The product's HTTP application on a real port, for tests: its settings, its keys, and the moment it is ready."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import uvicorn
from sqlalchemy import func
from sqlmodel import SQLModel, select

from labeling.database import Database
from labeling.label_studio import LabelStudioServer
from loop.aliases import NoGateway
from loop.clients import Clients
from loop.executors import LocalExecutor
from loop.mlflow_registry import Registry
from loop.object_store import open_store
from loop.settings import MlflowSettings, ObjectStoreSettings
from loop.vllm import Replica
from service.app import AppState, assemble, create_app
from service.auth import create_key
from service.http_guard import guarded
from service.settings import HttpSettings, Settings

PROJECT = "support-bot"
BASE = "base"
NOWHERE = "http://127.0.0.1:9"  # refuses every connection


def settings_for(
    replicas: Sequence[str], projects: Iterable[str] = (PROJECT,), data_dir: Path | None = None, **http: Any
) -> Settings:
    return Settings.model_validate(
        {
            "data_dir": data_dir or "nightschool-data",
            "http": http,
            "vllm": {"replicas": [{"url": url} for url in replicas]},
            "projects": [{"name": name, "base_dir": "/models/base", "base_name": BASE} for name in projects],
        }
    )


@dataclass(frozen=True)
class Service:
    url: str
    settings: Settings
    state: AppState

    @property
    def database(self) -> Database:
        return self.state.database

    async def key(self, *scopes: str, project: str | None = PROJECT) -> str:
        _, key = await create_key(self.database, "test", scopes, project)
        await self.state.keys.load(self.database)
        return key

    async def client(self, *scopes: str, project: str | None = PROJECT) -> httpx.AsyncClient:
        """With a key of these scopes; the test closes it."""
        headers = {"Authorization": f"Bearer {await self.key(*scopes, project=project)}"}
        return httpx.AsyncClient(base_url=self.url, headers=headers, timeout=30, trust_env=False)


def offline_clients(database: Database, folder: Path, replicas: Sequence[Replica] = ()) -> Clients:
    """A worker's, whose Label Studio and MLflow are down."""
    return Clients(
        database=database,
        label_studio=LabelStudioServer(NOWHERE, "unused"),
        registry=Registry(MlflowSettings(url=NOWHERE)),
        objects=open_store(ObjectStoreSettings(), folder / "archive"),
        executor=LocalExecutor(),
        replicas=tuple(replicas),
        aliases=NoGateway(),
    )


@asynccontextmanager
async def serving(app: Any, host: str = "127.0.0.1", http: HttpSettings | None = None) -> AsyncIterator[str]:
    """An ASGI application under uvicorn, on a free port of this machine, guarded as the product's is."""
    # Kept alive longer than any client keeps an idle connection: else both may close and use it at the same time.
    config = uvicorn.Config(
        app,
        host=host,
        port=0,
        http=guarded(http or HttpSettings()),
        lifespan="on",
        log_config=None,
        timeout_graceful_shutdown=2,
        timeout_keep_alive=75,
    )
    server = uvicorn.Server(config)
    task = asyncio.create_task(server.serve())
    while not server.started:
        assert not task.done(), "the application did not start"
        await asyncio.sleep(0.01)
    try:
        yield f"http://{host}:{server.servers[0].sockets[0].getsockname()[1]}"
    finally:
        server.should_exit = True
        await task


@asynccontextmanager
async def service(database: Database, settings: Settings, **parts: Any) -> AsyncIterator[Service]:
    """`parts`: of create_app."""
    state = assemble(settings, database)
    async with serving(create_app(settings, state, **parts), http=settings.http) as url:
        yield Service(url, settings, state)


async def eventually(holds: Callable[[], Any], seconds: float = 5.0) -> None:
    """Waits until it holds: a truth, or an awaitable one."""
    async with asyncio.timeout(seconds):
        while True:
            found = holds()
            if await found if asyncio.iscoroutine(found) else found:
                return
            await asyncio.sleep(0.01)


async def count(database: Database, table: type[SQLModel]) -> int:
    async with database.read() as session:
        return (await session.execute(select(func.count()).select_from(table))).scalar_one()


async def rows(database: Database, table: type[SQLModel]) -> list[Any]:
    async with database.read() as session:
        return list((await session.execute(select(table))).scalars())
