"""The servers around Nightschool: ours are started, kept alive and ended; those that others run are taken by URL."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import structlog

from loop.adapter_files import read_base_config
from loop.chat_template import chat_template
from service import servers
from service.children import Child, ServerFailed
from service.servers import LabelStudioLogin, Server
from service.settings import Settings

log = structlog.get_logger()
FIRST_PAUSE_SECONDS = 1.0
LONGEST_PAUSE_SECONDS = 60.0
STEADY_SECONDS = 300.0  # a server that ran this long starts anew with the shortest pause

Progress = Callable[[str], None]


@dataclass(frozen=True)
class Stack:
    """Where the outside systems answer. A managed one that is not running has the address ""."""

    vllm_urls: tuple[str, ...]
    label_studio_url: str
    label_studio_token: str
    mlflow_url: str
    kept: tuple[Kept, ...] = ()

    @classmethod
    def configured(cls, settings: Settings) -> Stack:
        """What the settings name; starts nothing."""
        token = settings.label_studio.token
        return cls(
            vllm_urls=tuple(replica.url for replica in settings.vllm.replicas),
            label_studio_url=settings.label_studio.url,
            label_studio_token=token.get_secret_value() if token else "",
            mlflow_url=settings.mlflow.url,
        )

    @property
    def children(self) -> tuple[Child, ...]:
        return tuple(kept.child for kept in self.kept if kept.child)

    async def stop(self) -> None:
        await asyncio.gather(*(kept.stop() for kept in self.kept))


async def start_stack(settings: Settings, *, log_dir: Path, progress: Progress) -> Stack:
    """Starts what is managed, all at once; gives the stack when all of it answers. Raises ServerFailed, leaving none.

    A second start over the same data directory finds the same databases, secrets and logins.
    """
    if settings.vllm.managed:
        project = settings.projects[0]
        read_base_config(project.base_dir)  # no model there, or no template: said before anything is started
        chat_template(project.base_dir, project.chat_template)
    login = _login(settings)
    managed = _managed(settings, login)
    kept = tuple(Kept(server, log_dir) for server in managed.values())
    try:
        async with asyncio.TaskGroup() as starting:
            for one in kept:
                starting.create_task(one.start(progress))
    except BaseException as error:
        await asyncio.gather(*(one.stop() for one in kept))
        if isinstance(error, BaseExceptionGroup):
            raise error.exceptions[0] from None
        raise
    urls = {name: server.url for name, server in managed.items()}
    configured = Stack.configured(settings)
    return Stack(
        vllm_urls=(urls["vllm"],) if "vllm" in urls else configured.vllm_urls,
        label_studio_url=urls.get("label_studio", configured.label_studio_url),
        label_studio_token=login.token if login else configured.label_studio_token,
        mlflow_url=urls.get("mlflow", configured.mlflow_url),
        kept=kept,
    )


def _login(settings: Settings) -> LabelStudioLogin | None:
    if not settings.label_studio.managed:
        return None
    return LabelStudioLogin.kept(settings.label_studio, settings.data_dir.resolve() / "secrets")


def _managed(settings: Settings, login: LabelStudioLogin | None) -> dict[str, Server]:
    data_dir, project = settings.data_dir.resolve(), settings.projects[0]
    ports = servers.free_ports(3)
    found = {}
    if settings.vllm.managed:
        found["vllm"] = servers.vllm(
            settings.vllm,
            project.base_dir,
            project.base_name,
            ports[0],
            data_dir / "vllm",
            chat_template=project.chat_template,
        )
    if login is not None:
        found["label_studio"] = servers.label_studio(settings.label_studio, login, ports[1], data_dir / "label-studio")
    if settings.mlflow.managed:
        found["mlflow"] = servers.mlflow(ports[2], data_dir / "mlflow")
    return found


class Kept:
    """A server that is started again, on the same port, whenever it ends without being asked to.

    What a vLLM had loaded is gone then; the worker compares each replica with what it should serve, and loads it again.
    """

    def __init__(self, server: Server, log_dir: Path) -> None:
        self.server = server
        self.log_dir = log_dir
        self.child: Child | None = None
        self._keeping: asyncio.Task[None] | None = None

    async def start(self, progress: Progress) -> None:
        started = time.monotonic()
        progress(f"starting {self.server.name}")
        child = self.child = self.server.start(self.log_dir)
        await self.server.wait_ready(child)
        progress(f"{self.server.name} ready after {time.monotonic() - started:.0f} s: {self.server.url}")
        self._keeping = asyncio.create_task(self._keep(child), name=f"keep {self.server.name}")

    async def stop(self) -> None:
        if self._keeping is not None:
            self._keeping.cancel()
            await asyncio.wait([self._keeping])
        if self.child is not None:
            await self.child.stop()

    async def _keep(self, child: Child) -> None:
        pause = FIRST_PAUSE_SECONDS
        while True:
            started = time.monotonic()
            status = await child.ended()
            if time.monotonic() - started > STEADY_SECONDS:
                pause = FIRST_PAUSE_SECONDS
            log.error("server_ended", server=self.server.name, status=status, last=child.last_lines(), pause=pause)
            await asyncio.sleep(pause)
            pause = min(2 * pause, LONGEST_PAUSE_SECONDS)
            try:
                child = self.child = self.server.start(self.log_dir)
            except OSError as error:
                log.error("server_not_restarted", server=self.server.name, error=str(error))
                continue  # the ended child is looked at again after a longer pause
            await self._ready_again(child)

    async def _ready_again(self, child: Child) -> None:
        try:
            await self.server.wait_ready(child)
        except ServerFailed as error:
            log.error("server_not_restarted", server=self.server.name, error=str(error), hint=error.hint)
            await child.stop()
        else:
            log.warning("server_restarted", server=self.server.name, url=self.server.url)
