"""`nightschool night watch`: the night that runs, as it runs, wherever its worker is.

On a terminal a screen that is drawn anew, elsewhere a line when there is something new, with --json a line of JSON.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.markup import escape

from loop.states import AT_WORK
from service.commands.local_api import Api, in_path, open_api
from service.commands.watch_screen import headline, plain, screen
from service.settings import load

LOOK_SECONDS = 1.0
LINE_SECONDS = 10.0  # between two lines of one stage where nobody draws


def run(path: Path, *, project: str | None, as_json: bool) -> None:
    """Until the night has ended; at once when none runs."""
    with contextlib.suppress(KeyboardInterrupt):
        asyncio.run(_run(path, project, as_json))


async def _run(path: Path, project: str | None, as_json: bool) -> None:
    settings, console = load(path), Console()
    async with open_api(settings, only_reads=True) as api:
        chosen = api.project(project)
        newest = await api.call("GET", "/v1/nights", project=chosen, limit=20)
        running = next((night for night in newest if night["state"] in AT_WORK), None)
        if running is None or not api.served:
            _nothing_runs(chosen, running or next(iter(newest), None), as_json)
            return
        nights = nights_of(api, running["id"])
        if as_json:
            await _lines(nights, lambda night: json.dumps(summary(night)))
        elif console.is_terminal:
            await _draw(console, nights)
        else:
            await _lines(nights, plain)


def summary(night: dict[str, Any]) -> dict[str, Any]:
    """One line of --json: the night, its stages so far, the running one's last line, and alarms."""
    return {
        **{key: night[key] for key in ("project", "id", "date", "state", "reason", "hint")},
        "finished": {stage["stage"]: stage["seconds"] for stage in night["stages"]},
        "live": night["live"],
        "alarms": [event for event in night["events"] if event["kind"] == "alarm"],
    }


async def nights_of(api: Api, night_id: str) -> AsyncIterator[dict[str, Any]]:
    """The night again and again, for the last time when it has ended."""
    while True:
        night: dict[str, Any] = await api.call("GET", f"/v1/nights/{in_path(night_id)}")
        yield night
        if night["state"] not in AT_WORK:
            return
        await asyncio.sleep(LOOK_SECONDS)


async def _draw(console: Console, nights: AsyncIterator[dict[str, Any]]) -> None:
    with Live(console=console, auto_refresh=False) as live:
        async for night in nights:
            live.update(screen(night), refresh=True)


async def _lines(nights: AsyncIterator[dict[str, Any]], told: Any) -> None:
    """Every stage, alarm and end at once; steps now and then."""
    said, at = None, 0.0
    async for night in nights:
        stage = (night["live"] or {}).get("stage")
        alarms = sum(event["kind"] == "alarm" for event in night["events"])
        matter = (night["state"], stage, len(night["stages"]), alarms)
        if matter != said or time.monotonic() - at >= LINE_SECONDS:
            said, at = matter, time.monotonic()
            print(told(night), flush=True)


def _nothing_runs(project: str, newest: dict[str, Any] | None, as_json: bool) -> None:
    if as_json:
        print(json.dumps({"project": project, "running": False, "newest": newest}))
        return
    console = Console()
    for line in _idle(project, newest):
        console.print(line)


def _idle(project: str, newest: dict[str, Any] | None) -> Iterator[str]:
    if newest is None:
        yield f"Project {project} has had no night yet. `nightschool night run` makes one."
        return
    if newest["state"] in AT_WORK:
        yield f"{headline(newest)}, but no process works on it: `nightschool up` takes it up where it stands."
        return
    yield f"No night of {project} runs. The newest: {headline(newest)}. {escape(newest['reason'] or '')}"
