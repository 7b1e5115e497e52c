"""From the labeller's click to the accepted label, with the real Label Studio: by webhook, and by polling alone."""

from __future__ import annotations

import asyncio
import secrets
import tempfile
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import uvicorn

from labeling.database import Database
from labeling.label_studio import LabelStudioServer
from labeling.labeling_screen import Opinion, as_result
from labeling.settings import LabelingSettings, LabelStudioSettings
from labeling.sync import LabelSync
from labeling.tables import Label, LabelState, ReviewItem
from loop.schedule import build_scheduler
from service import servers
from service.app import assemble, create_app
from service.bench.figure import Figure, Say
from service.bench.promises import held
from service.routes.hooks import hook_routes
from service.servers import HOOK_HOST, LabelStudioLogin
from service.settings import Settings

CLICKS = 20
POLL_SECONDS = 3.0
LONGEST_WAIT_SECONDS = 60.0
PROJECT = "bench"


def run(say: Say) -> list[Figure]:
    return asyncio.run(_run(say))


async def _run(say: Say) -> list[Figure]:
    with tempfile.TemporaryDirectory(prefix="nightschool-bench-") as name:
        folder = Path(name)
        say("starting Label Studio (its first start makes a database: half a minute)")
        async with _label_studio(folder) as server:
            database = Database(f"sqlite+aiosqlite:///{folder / 'bench.db'}")
            await database.create_tables()
            try:
                hooked = await _by_webhook(database, server, say)
                polled = await _by_polling(database, server, say)
            finally:
                await database.close()
    middle, longest = sorted(hooked)[len(hooked) // 2], max(hooked)
    seen = f"{len(hooked)} clicks: median {middle:.2f} s, longest {longest:.2f} s"
    by_poll = f"{len(polled)} clicks at random moments, poll_seconds = {POLL_SECONDS:g}: longest {max(polled):.2f} s"
    return [
        held("label_seconds_by_webhook", longest, seen),
        held("label_poll_intervals_by_polling", max(polled) / POLL_SECONDS, by_poll),
    ]


@asynccontextmanager
async def _label_studio(folder: Path) -> AsyncIterator[LabelStudioServer]:
    settings = LabelStudioSettings(managed=True)
    login = LabelStudioLogin.kept(settings, folder / "secrets")
    managed = servers.label_studio(settings, login, servers.free_ports(1)[0], folder / "label-studio")
    child = managed.start(folder / "logs")
    try:
        await managed.wait_ready(child)
        server = LabelStudioServer(managed.url, login.token)
        yield server
        await server.close()
    finally:
        await child.stop()


async def _by_webhook(database: Database, server: LabelStudioServer, say: Say) -> list[float]:
    syncs: dict[str, LabelSync] = {}
    async with _hooks(database, server, syncs) as url:
        sync = syncs[PROJECT] = LabelSync(database, server, PROJECT, LabelingSettings(), url)
        await _flag(database)
        await sync.round()
        running = asyncio.create_task(sync.run())
        try:
            say(f"{CLICKS} clicks with the webhook, never polling")
            return [await _click(database, server, pause=_some_of(2.0)) for _ in range(CLICKS)]
        finally:
            running.cancel()
            await asyncio.gather(running, return_exceptions=True)


async def _by_polling(database: Database, server: LabelStudioServer, say: Say) -> list[float]:
    sync = LabelSync(database, server, PROJECT, LabelingSettings())
    await _flag(database)
    await sync.round()  # takes the webhook out, too
    scheduler = build_scheduler({}, _nothing, {"labels": (POLL_SECONDS, sync.round)})
    scheduler.start()
    try:
        say(f"{CLICKS} clicks without it, a poll every {POLL_SECONDS:g} s")
        return [await _click(database, server, pause=_some_of(POLL_SECONDS)) for _ in range(CLICKS)]
    finally:
        scheduler.shutdown(wait=False)


def _some_of(seconds: float) -> float:
    return seconds * secrets.randbelow(1000) / 1000


async def _nothing(_: object) -> None:
    return None


async def _flag(database: Database) -> None:
    items = [
        ReviewItem(
            project=PROJECT,
            prompt_digest=secrets.token_hex(8),
            messages=[{"role": "user", "content": f"Question {number}?"}],
            answer="The wrong answer.",
            score=number / CLICKS,
            count=1,
        )
        for number in range(CLICKS)
    ]
    async with database.write() as session:
        session.add_all(items)


async def _click(database: Database, server: LabelStudioServer, *, pause: float) -> float:
    """Seconds from the moment that the labeller's request leaves until the label is accepted."""
    await asyncio.sleep(pause)
    project = server.remembered_project(PROJECT)
    offer = None if project is None else await server.next_task(project)
    if offer is None or offer.item_id is None:
        raise RuntimeError("Label Studio offers no task of ours")
    started = time.monotonic()
    await server.annotate(offer.id, as_result(Opinion("wrong", "The right answer.")))
    while time.monotonic() - started < LONGEST_WAIT_SECONDS:
        async with database.read() as session:
            label = await session.get(Label, offer.item_id)
        if label is not None and label.state is LabelState.ACCEPTED:
            break
        await asyncio.sleep(0.01)
    return time.monotonic() - started


@asynccontextmanager
async def _hooks(database: Database, server: LabelStudioServer, syncs: dict[str, LabelSync]) -> AsyncIterator[str]:
    """The product's application with its door for the webhook, where a managed Label Studio reaches it."""
    project = {"name": PROJECT, "base_dir": "/nowhere", "base_name": "base"}
    settings = Settings.model_validate({"projects": [project]})
    state = assemble(settings, database)
    routes = hook_routes(server, [PROJECT], lambda name: syncs[name].hint(), state.metrics)
    app = create_app(settings, state, extra_routes=routes)
    config = uvicorn.Config(app, host=HOOK_HOST, port=0, log_config=None, lifespan="on")
    http = uvicorn.Server(config)
    serving = asyncio.create_task(http.serve())
    while not http.started:  # noqa: ASYNC110  # uvicorn has no event for it
        await asyncio.sleep(0.01)
    try:
        yield f"http://{HOOK_HOST}:{http.servers[0].sockets[0].getsockname()[1]}"
    finally:
        http.should_exit = True
        await serving
