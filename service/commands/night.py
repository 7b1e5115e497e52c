"""`nightschool night run | show`, `approve`, `refuse`, `rollback`."""

from __future__ import annotations

import asyncio
import json
from contextlib import AsyncExitStack
from datetime import date as Date
from pathlib import Path
from typing import Any, ClassVar

from rich.console import Console
from rich.markup import escape

from labeling.errors import InvalidInput, NightschoolError, NotFound
from service import installation, logging
from service.commands.local_api import Api, chosen_project, in_path, open_api, with_api
from service.commands.watch import nights_of
from service.commands.watch_screen import plain
from service.commands.whole_tables import WholeMarkdown
from service.data_dir import DataDirLock
from service.settings import Settings, load
from service.stack import start_stack


class NoNight(NotFound):
    code = "no_night"


class BadDate(InvalidInput):
    code = "bad_date"
    default_hint = "Write it as YYYY-MM-DD."


class NightFailed(NightschoolError):
    code: ClassVar[str] = "night_failed"


def run(path: Path, *, project: str | None, date: str | None, resume: bool) -> None:
    """In the running process, or, while none runs, in this one with the managed servers started for it."""
    settings = load(path)
    night = asyncio.run(_run(settings, project, date, resume))
    _print(night)
    if night["state"] == "FAILED":
        raise NightFailed(f"night {night['id']} FAILED: {night['reason']}", hint=night["hint"] or "")


async def _run(settings: Settings, project: str | None, date: str | None, resume: bool) -> dict[str, Any]:
    name = chosen_project(settings, project)
    if date is not None:
        _checked(date)
    async with AsyncExitStack() as closing:
        if DataDirLock.holder(settings.data_dir.resolve()) is None and not settings.database.url:
            await _in_this_process(settings, closing)
        api = await closing.enter_async_context(open_api(settings))
        if resume:
            night_id = (await _newest(api, name, {"FAILED", "SKIPPED"}))["id"]
            await api.call("POST", f"/v1/nights/{in_path(night_id)}/resume", {})
        else:
            night_id = (await api.call("POST", "/v1/nights", {"project": name, "date": date}))["id"]
        return await _watch(api, night_id)


def _checked(date: str) -> None:
    """Before any server is started for it."""
    try:
        Date.fromisoformat(date)
    except ValueError as error:
        raise BadDate(f"--date {date}: {error}") from None


async def _in_this_process(settings: Settings, closing: AsyncExitStack) -> None:
    """What `nightschool up` starts, for as long as this night takes."""
    logging.configure(json=False)
    listener = closing.enter_context(installation.listen(settings))
    data_dir = settings.data_dir.resolve()
    closing.enter_context(DataDirLock(data_dir, installation.address(listener)))
    stack = await start_stack(settings, log_dir=data_dir / "logs", progress=lambda text: Console().print(escape(text)))
    closing.push_async_callback(stack.stop)
    composed = await closing.enter_async_context(installation.compose(settings, stack, None, work=True))
    await installation.admin_key(composed)
    await closing.enter_async_context(installation.http_server(composed, listener))
    assert composed.worker is not None
    closing.push_async_callback(composed.worker.stop)
    await composed.worker.start()


async def _watch(api: Api, night_id: str) -> dict[str, Any]:
    console, seen = Console(), set[str]()
    with console.status("claimed") as status:
        async for night in nights_of(api, night_id):
            for stage in night["stages"]:
                if stage["stage"] not in seen:
                    seen.add(stage["stage"])
                    console.print(f"  {stage['stage']} {stage['seconds']:.1f} s")
            status.update(escape(plain(night)))
    return night


def show(path: Path, night_id: str | None, *, project: str | None, as_json: bool) -> None:
    async def body(api: Api) -> dict[str, Any]:
        chosen = night_id or (await _newest(api, api.project(project), None))["id"]
        night: dict[str, Any] = await api.call("GET", f"/v1/nights/{in_path(chosen)}")
        return night

    night = with_api(path, body)
    if as_json:
        print(json.dumps(night, indent=1))
    else:
        _print(night)


def approve(path: Path, night_id: str | None, *, project: str | None, why: str) -> None:
    async def body(api: Api) -> dict[str, Any]:
        chosen = night_id or (await _newest(api, api.project(project), {"awaiting_approval", "ROLLED_BACK"}))["id"]
        night: dict[str, Any] = await api.call("POST", f"/v1/nights/{in_path(chosen)}/approve", {"why": why})
        if not api.served:
            Console().print("Approved. Nothing runs now: `nightschool up` promotes it when it starts.")
            return night
        return await _watch(api, chosen)

    _print(with_api(path, body))


def refuse(path: Path, night_id: str | None, *, project: str | None, why: str) -> None:
    async def body(api: Api) -> dict[str, Any]:
        chosen = night_id or (await _newest(api, api.project(project), {"awaiting_approval"}))["id"]
        night: dict[str, Any] = await api.call("POST", f"/v1/nights/{in_path(chosen)}/refuse", {"why": why})
        return night

    _print(with_api(path, body))


def rollback(path: Path, *, project: str | None, to: str | None, why: str) -> None:
    async def body(api: Api) -> None:
        status = await api.call("POST", f"/v1/projects/{api.project(project)}/rollback", {"to": to, "why": why})
        print(f"{status['project']} is served by {status['current']}.")

    with_api(path, body)


async def _newest(api: Api, project: str, states: set[str] | None) -> dict[str, Any]:
    for night in await api.call("GET", "/v1/nights", project=project, limit=200):
        if states is None or night["state"] in states:
            found: dict[str, Any] = night
            return found
    wanted = f" that is {' or '.join(sorted(states))}" if states else ""
    raise NoNight(f"project {project!r} has no night{wanted}", hint="`nightschool night run` makes one.")


def _print(night: dict[str, Any]) -> None:
    console = Console()
    console.print(f"[bold]{night['project']} {night['date']}: {night['state']}[/]  {escape(night['reason'] or '')}")
    if night["hint"]:
        console.print(f"  {escape(night['hint'])}")
    if night["report"]:
        console.print(WholeMarkdown(night["report"]))
