"""Puts one installation together: database, outside systems, HTTP application, worker."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator, Mapping
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import structlog
import uvicorn

from labeling.database import Database
from labeling.errors import Conflict, Unavailable
from labeling.label_studio import LabelStudioServer
from labeling.name_recogniser import NameRecogniser, close_all, name_recogniser
from loop import lease
from loop.aliases import AliasSwitch
from loop.clients import Clients
from loop.executors import LocalExecutor
from loop.mlflow_registry import Registry
from loop.object_store import open_store
from loop.runner import Runner
from loop.settings import ProjectSettings
from loop.vllm import Replica
from loop.worker import Worker
from service import auth, migrations
from service.app import AppState, assemble, create_app
from service.health import Check
from service.hints import Announcer
from service.http_guard import guarded
from service.routes.hooks import hook_routes
from service.routes.keys import key_routes
from service.routes.labels import label_routes
from service.routes.nights import NightDesk, night_routes
from service.routes.pages import page_routes
from service.routes.queue import queue_routes
from service.routes.transfer import transfer_routes
from service.secret_files import write_secret
from service.servers import HOOK_HOST
from service.settings import HttpSettings, Settings
from service.stack import Stack

log = structlog.get_logger()
STOP_SECONDS = 20


class PortTaken(Conflict):
    code = "port_taken"
    default_hint = "Set http.port to another port, or to 0 for any free one."


@dataclass(frozen=True)
class Installation:
    """Everything of one process. `worker` is there in `up` and `work`."""

    settings: Settings
    stack: Stack
    database: Database
    clients: Clients
    state: AppState
    runner: Runner
    worker: Worker | None

    @property
    def projects(self) -> Mapping[str, ProjectSettings]:
        return self.runner.projects

    def application(self) -> object:
        """The ASGI application, nights and keys included."""
        desk = NightDesk(
            clients=self.clients,
            projects=self.projects,
            data_dir=self.settings.data_dir.resolve(),
            keys=self.state.keys,
            live=self.runner.live,
            wake=self.worker.wake if self.worker else lambda: None,
        )
        announcer = Announcer(self.database)
        hint = self.worker.hint_labels if self.worker else announcer.hint
        common = (self.database, self.state.keys)
        extra = [
            *night_routes(desk),
            *label_routes(desk),
            *queue_routes(desk),
            *page_routes(desk),
            *key_routes(*common, tuple(self.projects)),
            *transfer_routes(*common, self.state.reporters, self.projects),
            *hook_routes(self.clients.label_studio, self.projects, hint, self.state.metrics),
        ]
        lifespan = [] if self.worker else [announcer.running]
        return create_app(self.settings, self.state, extra_routes=extra, lifespan=lifespan)


@asynccontextmanager
async def compose(
    settings: Settings, stack: Stack, aliases: AliasSwitch | None, work: bool, hook_url: str = ""
) -> AsyncIterator[Installation]:
    """Migrates the database and builds the parts. `aliases` None: the gateway of this process.

    `hook_url`: where Label Studio reaches us, unless the settings say.
    """
    await asyncio.to_thread(migrations.upgrade, settings.database_url)
    async with AsyncExitStack() as closing:
        database = Database(settings.database_url)
        closing.push_async_callback(database.close)
        state = assemble(settings, database, stack.vllm_urls)
        clients = _clients(settings, stack, database, aliases or state.aliases)
        closing.push_async_callback(clients.label_studio.close)
        for replica in clients.replicas:
            closing.push_async_callback(replica.close)
        recognisers = _name_recognisers(settings) if work else {}
        closing.callback(close_all)
        await _try_names(recognisers)
        projects = {project.name: project for project in settings.projects}
        runner = Runner(clients, projects, settings.vllm, settings.data_dir.resolve())
        hook_url = settings.label_studio.webhook_url or hook_url
        worker = Worker(runner, settings.mlflow, hook_url) if work else None
        if work and database.is_sqlite:  # under the data folder's lock: one process at a time
            await lease.free_all(database)
        state = _with_checks(state, clients, recognisers)
        yield Installation(settings, stack, database, clients, state, runner, worker)


def _clients(settings: Settings, stack: Stack, database: Database, aliases: AliasSwitch) -> Clients:
    key = settings.vllm.api_key
    folders = {replica.url: replica.adapter_dir for replica in settings.vllm.replicas}
    return Clients(
        database=database,
        label_studio=LabelStudioServer(
            stack.label_studio_url, stack.label_studio_token, settings.label_studio.timeout_seconds
        ),
        registry=Registry(settings.mlflow, url=stack.mlflow_url),
        objects=open_store(settings.object_store, settings.archive_dir),
        executor=LocalExecutor(),
        replicas=tuple(
            Replica(url, adapter_dir=folders.get(url, ""), api_key=key.get_secret_value() if key else None)
            for url in stack.vllm_urls
        ),
        aliases=aliases,
    )


def _name_recognisers(settings: Settings) -> dict[str, NameRecogniser]:
    """By the name of their check; of the projects that have names replaced."""
    folders = dict.fromkeys(project.labeling.redaction.names_model for project in settings.projects)
    return {f"names {folder.name}": name_recogniser(folder) for folder in folders if folder is not None}


async def _try_names(recognisers: Mapping[str, NameRecogniser]) -> None:
    """A folder that can't work ends the start; a child that is late only delays feedback, which waits for it."""
    for name, recogniser in recognisers.items():
        try:
            log.info("names_replaced", model=await asyncio.to_thread(recogniser.check))
        except Unavailable as error:
            log.warning("names_unavailable", check=name, reason=str(error), hint=error.hint)


def _with_checks(state: AppState, clients: Clients, recognisers: Mapping[str, NameRecogniser]) -> AppState:
    """/ready also tells of the systems that the night needs; their trouble stops no request."""

    async def label_studio() -> str:
        return f"Label Studio {(await clients.label_studio.check()).version}"

    async def mlflow() -> str:
        await clients.registry.check()
        return "answers"

    checks: dict[str, Check] = {"label_studio": label_studio, "mlflow": mlflow}
    checks |= {name: _names_check(recogniser) for name, recogniser in recognisers.items()}
    return AppState(**{**vars(state), "checks": checks})


def _names_check(recogniser: NameRecogniser) -> Check:
    async def check() -> str:
        return recogniser.last_known()

    return check


async def admin_key(installation: Installation) -> Path:
    """The file with this machine's own admin key: made at the first start, readable by its owner only."""
    path = installation.settings.data_dir.resolve() / "secrets" / "admin_key"
    keys = installation.state.keys
    await keys.load(installation.database)
    if path.exists():
        try:
            keys.authenticate(f"Bearer {path.read_text(encoding='utf-8').strip()}")
        except auth.Unauthenticated:
            log.warning("admin_key_replaced", path=str(path))
        else:
            return path
    _, key = await auth.create_key(installation.database, "operator", ["admin"])
    await keys.load(installation.database)
    write_secret(path, key)
    return path


def listen(settings: Settings) -> socket.socket:
    """Bound now, so that the address is known before anything slow starts."""
    family = socket.AF_INET6 if ":" in settings.http.host else socket.AF_INET
    # Named by its number, not left at 0: asyncio sets TCP_NODELAY on no other. Without it every answer waits 40 ms.
    listener = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((settings.http.host, settings.http.port))
    except OSError as error:
        listener.close()
        raise PortTaken(f"cannot listen on {settings.http.host}:{settings.http.port}: {error.strerror}") from error
    return listener


def listen_for_hooks(settings: Settings) -> socket.socket | None:
    """A second door for the Label Studio that we manage, where it may reach us without reaching anything else of this
    machine. None where there is no need or no such address: labels then come by polling.
    """
    if not settings.label_studio.managed or settings.label_studio.webhook_url:
        return None
    listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    try:
        listener.bind((HOOK_HOST, 0))
    except OSError as error:
        listener.close()
        log.warning("no_webhook", address=HOOK_HOST, reason=error.strerror, consequence="labels come by polling alone")
        return None
    return listener


def address(listener: socket.socket) -> str:
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


class _Server(uvicorn.Server):
    """Signals are the command's business, not the server's."""

    def install_signal_handlers(self) -> None:
        return None


def http_server(installation: Installation, *listeners: socket.socket) -> AbstractAsyncContextManager[None]:
    return serving(installation.application(), installation.settings.http, *listeners)


@asynccontextmanager
async def serving(application: object, settings: HttpSettings, *listeners: socket.socket) -> AsyncIterator[None]:
    """Serves until the block ends; requests in flight get `STOP_SECONDS` to end."""
    config = uvicorn.Config(
        application,  # type: ignore[arg-type]  # Litestar is an ASGI application
        http=guarded(settings),
        log_config=None,
        access_log=False,
        lifespan="on",
        timeout_graceful_shutdown=STOP_SECONDS,
        timeout_keep_alive=75,  # longer than clients keep idle connections: only one side may let go
        server_header=False,
    )
    server = _Server(config)
    task = asyncio.create_task(server._serve(list(listeners)), name="http")
    try:
        while not server.started:
            if task.done():
                await task
                raise PortTaken("the HTTP server ended while it started; the log says why")
            await asyncio.sleep(0.02)
        yield
    finally:
        server.should_exit = True
        await task
