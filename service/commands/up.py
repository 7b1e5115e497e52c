"""`up`, `serve` and `work`: processes that run until a signal."""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import Coroutine
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import structlog
import uvloop

from labeling.errors import InvalidInput
from loop.aliases import NoGateway
from service import installation, logging
from service.data_dir import DataDirLock
from service.hints import listen
from service.installation import Installation
from service.settings import Settings, load
from service.signals import cancel_on_signal
from service.stack import Stack, start_stack

log = structlog.get_logger()


class NeedsPostgres(InvalidInput):
    code = "needs_postgres"
    default_hint = "Set database.url to a PostgreSQL, or run everything in one process with `nightschool up`."


class NeedsUrls(InvalidInput):
    code = "needs_urls"
    default_hint = "Give each of [vllm], [label_studio], [mlflow] its url (managed = false), or use `nightschool up`."


def up(path: Path) -> None:
    """One process: managed servers, HTTP and worker; SQLite allowed, under the data folder's lock."""
    settings = load(path)
    logging.configure(json=True)
    uvloop.run(_until_signal(_up(settings)))


def serve(path: Path) -> None:
    settings = _apart(load(path))
    logging.configure(json=True)
    uvloop.run(_until_signal(_serve(settings)))


def work(path: Path) -> None:
    settings = _apart(load(path))
    logging.configure(json=True)
    uvloop.run(_until_signal(_work(settings)))


def _apart(settings: Settings) -> Settings:
    if not settings.database_url.startswith("postgresql"):
        raise NeedsPostgres("`serve` and `work` are two processes, and SQLite allows one")
    managed = [name for name in ("vllm", "label_studio", "mlflow") if getattr(settings, name).managed]
    if managed:
        raise NeedsUrls(f"`serve` and `work` start no servers, but {', '.join(managed)} is managed")
    return settings


async def _until_signal(body: Coroutine[Any, Any, None]) -> None:
    """SIGINT and SIGTERM cancel the body, which then closes in order."""
    task = asyncio.create_task(body)
    cancel_on_signal(task, lambda: log.info("still_stopping", hint="Servers get up to a minute to end in order."))
    try:
        await task
    except asyncio.CancelledError:
        log.info("stopped")


async def _up(settings: Settings) -> None:
    async with AsyncExitStack() as closing:
        listener = closing.enter_context(installation.listen(settings))
        url = installation.address(listener)
        data_dir = settings.data_dir.resolve()
        closing.enter_context(DataDirLock(data_dir, url))
        (data_dir / "state" / "ready.json").unlink(missing_ok=True)
        log.info("starting", url=url, data_dir=str(data_dir))
        stack = await start_stack(
            settings, log_dir=data_dir / "logs", progress=lambda text: log.info("stack", step=text)
        )
        closing.push_async_callback(stack.stop)
        hooks = installation.listen_for_hooks(settings)
        doors = [listener, closing.enter_context(hooks)] if hooks else [listener]
        composed = await closing.enter_async_context(
            installation.compose(
                settings, stack, None, work=True, hook_url=installation.address(hooks) if hooks else ""
            )
        )
        key_file = await installation.admin_key(composed)
        await closing.enter_async_context(installation.http_server(composed, *doors))
        assert composed.worker is not None
        closing.push_async_callback(composed.worker.stop)
        await composed.worker.start()
        _say_ready(composed, url, key_file)
        await asyncio.Event().wait()


async def _serve(settings: Settings) -> None:
    async with AsyncExitStack() as closing:
        listener = closing.enter_context(installation.listen(settings))
        composed = await closing.enter_async_context(
            installation.compose(settings, Stack.configured(settings), None, work=False)
        )
        key_file = await installation.admin_key(composed)
        await closing.enter_async_context(installation.http_server(composed, listener))
        _say_ready(composed, installation.address(listener), key_file)
        await asyncio.Event().wait()


async def _work(settings: Settings) -> None:
    stack = Stack.configured(settings)
    async with installation.compose(settings, stack, NoGateway(), work=True) as composed:
        assert composed.worker is not None
        await composed.worker.start()
        hints = asyncio.create_task(listen(composed.database, composed.worker.hint_labels), name="hear hints")
        log.info("working", projects=list(composed.projects))
        try:
            await asyncio.Event().wait()
        finally:
            hints.cancel()
            await asyncio.gather(hints, return_exceptions=True)
            await composed.worker.stop()


def _say_ready(composed: Installation, url: str, key_file: Path) -> None:
    """A line in the log and a file for scripts; secrets lie beside it in files of their own."""
    stack = composed.stack
    told = {
        "pid": os.getpid(),
        "url": url,
        "label_studio_url": stack.label_studio_url,
        "mlflow_url": stack.mlflow_url,
        "vllm_urls": list(stack.vllm_urls),
        "admin_key_file": str(key_file),
    }
    folder = composed.settings.data_dir.resolve() / "state"
    folder.mkdir(parents=True, exist_ok=True)
    temporary = folder / ".ready.json"
    temporary.write_text(json.dumps(told), encoding="utf-8")
    temporary.replace(folder / "ready.json")
    log.info("ready", **told)
