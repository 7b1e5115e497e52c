"""How commands reach their installation: over HTTP while a process runs it, in this process while none does."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import ExitStack, asynccontextmanager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, TypeVar
from urllib.parse import quote

import httpx

from labeling.errors import InvalidInput, NightschoolError, Unavailable
from service import installation
from service.data_dir import DataDirInUse, DataDirLock, Holder
from service.installation import Installation
from service.settings import Settings, load
from service.stack import Stack

T = TypeVar("T")
TIMEOUT_SECONDS = 120
COMMAND_SECONDS = 15.0  # how long another command is waited for


class Answered(NightschoolError):
    """The API's own problem, in its words. `again`: it may be gone in a moment."""

    code: ClassVar[str] = "answered"

    def __init__(self, message: str, *, hint: str | None = None, again: bool = False) -> None:
        super().__init__(message, hint=hint)
        self.again = again


class NoProcess(Unavailable):
    code = "no_process"


class WhichProject(InvalidInput):
    code = "which_project"


class NoId(InvalidInput):
    code = "no_id"
    default_hint = "Give one that `night show`, `keys list`, `labels held` or `gold list` shows."


@dataclass(frozen=True)
class Api:
    """`served`: by a process that runs, so that a worker takes up what is asked for."""

    client: httpx.AsyncClient
    settings: Settings
    served: bool

    async def call(self, method: str, path: str, body: Any = None, **params: Any) -> Any:
        with _reached(self.client):
            answer = await self.client.request(method, path, json=body, params=params)
        return _checked(answer).json()

    async def send(self, path: str, lines: bytes, params: dict[str, Any]) -> Any:
        """POSTs lines of JSON."""
        with _reached(self.client):
            headers = {"Content-Type": "application/x-ndjson"}
            answer = await self.client.post(path, content=lines, params=params, headers=headers)
        return _checked(answer).json()

    @asynccontextmanager
    async def stream(self, path: str, params: dict[str, Any]) -> AsyncIterator[httpx.Response]:
        """An answer of any length, whose body is still to be read."""
        with _reached(self.client):
            async with self.client.stream("GET", path, params=params) as answer:
                if answer.is_error:
                    await answer.aread()
                yield _checked(answer)

    def project(self, name: str | None) -> str:
        return chosen_project(self.settings, name)


@contextmanager
def _reached(client: httpx.AsyncClient) -> Iterator[None]:
    try:
        yield
    except httpx.TransportError as error:
        raise NoProcess(
            f"{client.base_url} does not answer: {error}",
            hint="`nightschool up` may still be starting, which takes a minute; otherwise look at its log.",
        ) from error


def _checked(answer: httpx.Response) -> httpx.Response:
    if answer.is_error:
        problem = answer.json() if "json" in answer.headers.get("content-type", "") else {}
        again = answer.status_code == httpx.codes.SERVICE_UNAVAILABLE
        raise Answered(problem.get("detail", answer.text[:300]), hint=problem.get("hint", ""), again=again)
    return answer


def chosen_project(settings: Settings, name: str | None) -> str:
    """The named one, or the only one."""
    if name is not None:
        return settings.project(name).name
    if len(settings.projects) > 1:
        names = ", ".join(project.name for project in settings.projects)
        raise WhichProject("there are several projects", hint=f"Name one with --project: {names}.")
    return settings.projects[0].name


def in_path(given: str) -> str:
    """An id from the command line as one segment of a path, whatever it holds."""
    if not given:
        raise NoId("an empty id")
    return quote(given, safe="")


def with_api(path: Path, body: Callable[[Api], Awaitable[T]], *, streams: bool = False) -> T:
    """Runs `body` with the installation's API; Ctrl-C ends it quietly. `streams`: answers may be of any length."""

    async def run() -> T:
        async with open_api(load(path), streams=streams) as api:
            return await body(api)

    return asyncio.run(run())


@asynccontextmanager
async def open_api(settings: Settings, *, streams: bool = False, only_reads: bool = False) -> AsyncIterator[Api]:
    """`only_reads`, for long: on PostgreSQL other commands are not kept waiting meanwhile."""
    data_dir = settings.data_dir.resolve()
    holder = await _server(data_dir)
    if holder is not None:
        async with httpx.AsyncClient(
            base_url=holder.url, headers=_key(data_dir), timeout=TIMEOUT_SECONDS, trust_env=False
        ) as client:
            yield Api(client, settings, served=True)
        return
    with ExitStack() as lock:
        lock.enter_context(DataDirLock(data_dir, f"process {os.getpid()}"))
        async with installation.compose(settings, Stack.configured(settings), None, work=False) as composed:
            await installation.admin_key(composed)
            if only_reads and settings.database.url:
                lock.close()
            async with _client_of(composed, streams) as client:
                client.headers.update(_key(data_dir))
                yield Api(client, settings, served=bool(settings.database.url))


@asynccontextmanager
async def _client_of(composed: Installation, streams: bool) -> AsyncIterator[httpx.AsyncClient]:
    """httpx keeps a whole answer in memory before it hands it on, unless it comes over a socket."""
    if not streams:
        transport = httpx.ASGITransport(composed.application())  # type: ignore[arg-type]  # an ASGI application
        async with httpx.AsyncClient(
            transport=transport, base_url="http://nightschool", timeout=TIMEOUT_SECONDS
        ) as client:
            yield client
        return
    anywhere = composed.settings.http.model_copy(update={"host": "127.0.0.1", "port": 0})
    with installation.listen(composed.settings.model_copy(update={"http": anywhere})) as listener:
        async with (
            installation.http_server(composed, listener),
            httpx.AsyncClient(
                base_url=installation.address(listener), timeout=TIMEOUT_SECONDS, trust_env=False
            ) as client,
        ):
            yield client


async def _server(data_dir: Path) -> Holder | None:
    """The process that serves this folder, if any; another command that has it for a moment is waited for."""
    deadline = time.monotonic() + COMMAND_SECONDS
    while (holder := DataDirLock.holder(data_dir)) and not holder.serves:
        if time.monotonic() > deadline:
            raise DataDirInUse(f"{data_dir} is in use by {holder.url}", hint="Try again when that command has ended.")
        await asyncio.sleep(0.1)
    return holder


def _key(data_dir: Path) -> dict[str, str]:
    path = data_dir / "secrets" / "admin_key"
    try:
        return {"Authorization": f"Bearer {path.read_text(encoding='utf-8').strip()}"}
    except OSError as error:
        raise NoProcess(
            f"cannot read the operator's key {path}: {error.strerror}",
            hint="Run this as the user that runs `nightschool up`.",
        ) from error
