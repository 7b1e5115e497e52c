"""`night watch`: what it shows of a night whose worker is another process, on a terminal, in a pipe and as JSON."""

from __future__ import annotations

import asyncio
import io
import json
import os
import pty
import subprocess
import sys
from collections.abc import AsyncIterator
from datetime import date
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from labeling.database import Database, now
from loop import states
from loop.night_view import night_view
from loop.tables import Night, NightEvent, NightProgress, NightState, StageMarker
from loop.watch import live
from loop.watch.live import Live
from service import migrations
from service.commands.watch_screen import plain, screen

ROOT = Path(__file__).parent.parent.parent
LINE: dict[str, Any] = {
    **{"stage": "train", "step": 120, "total_steps": 400, "loss": 0.4123, "grad_norm": 0.71, "learning_rate": 1e-3},
    **{"tokens_per_s": 9812.0, "memory_bytes": 21_300_000_000, "seconds_left": 754.0, "time_limited": True},
    **{"gpu_memory_bytes": 31.2e9, "gpu_memory_total_bytes": 85.5e9, "utilisation": 0.97, "temperature_c": 86.0},
    **{"power_w": 655.0, "power_cap_w": 700.0, "alarms": ["temperature: 86 C, above 85 C"], "slowed_by": "temperature"},
}
ALARM = {"alarm": "temperature", "action": "slow_down", "message": "86 C, above 85 C", "over": False}


def night(**changed: Any) -> dict[str, Any]:
    return {
        **{"project": "support-bot", "id": "ni_1", "date": "2026-01-01", "state": "running"},
        **{"reason": None, "hint": None},
        **{"stages": [{"stage": "build_delta", "seconds": 3.2}], "events": [], "live": LINE, **changed},
    }


def shown(given: dict[str, Any]) -> str:
    out = io.StringIO()
    Console(file=out, width=100, force_terminal=False).print(screen(given))
    return out.getvalue()


def test_the_screen_shows_all_that_one_looks_for() -> None:
    """Stage, bar, step, loss, speed, the card's memory, heat, power, time left, and alarms."""
    text = shown(night())
    for part in ("support-bot 2026-01-01: running", "build_delta 3 s", "120/400", "0.4123", "9,812", "31.2 of 86 GB"):
        assert part in text, part
    for part in ("97%", "86 C", "655 of 700 W", "13 min, fitted into the hours allowed", "! temperature: 86 C", "━"):
        assert part in text, part


def test_a_line_says_the_same_without_a_terminal() -> None:
    text = plain(night())
    assert "\n" not in text
    assert "\x1b" not in text
    for part in ("train", "step 120/400", "loss 0.4123", "ALARM temperature: 86 C, above 85 C", "slowed by"):
        assert part in text, part


def test_other_stages_and_ends_have_their_own_words() -> None:
    """What the exam is doing; before the first step nothing is invented; an ended night its reason and cure."""
    assert "doing held_out" in plain(night(live={"stage": "evaluate", "doing": "held_out"}))
    assert plain(night(live={"stage": "train"})).endswith("train")
    assert plain(night(live=None)) == "support-bot 2026-01-01: running"
    ended = night(state="FAILED", reason="disk full", hint="Free some.", live=None)
    assert plain(ended).endswith("disk full")
    assert "Free some." in shown(ended)


async def test_the_line_reaches_other_processes_and_goes_with_the_night(
    database: Database, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From the database where this process has no worker; from memory where it has; none once the night has ended."""
    monkeypatch.setattr(live, "WRITE_SECONDS", 0.05)
    one = Night(project="p", date=date(2026, 1, 1), due_at=now())
    async with database.write() as session:
        session.add(one)
    here = Live()
    async with here.kept(database, one.id):
        here.put(one.id, {"stage": "train", "step": 1})
        here.put(one.id, {"stage": "train", "step": 2})
        seen = None
        async with asyncio.timeout(10):
            while not seen:
                await asyncio.sleep(0.05)
                seen = (await night_view(database, tmp_path, one.id, None))["live"]
        assert (seen["stage"], seen["step"]) == ("train", 2)
        assert (await night_view(database, tmp_path, one.id, here.get(one.id)))["live"] == {"stage": "train", "step": 2}
    assert here.get(one.id) is None
    async with database.write() as session:
        await states.move(session, one.id, NightState.FAILED, reason="r", hint="h")
    assert (await night_view(database, tmp_path, one.id, None))["live"] is None


@pytest.fixture
async def elsewhere(tmp_path: Path) -> AsyncIterator[tuple[Database, Path]]:
    """A database with a worker in another process, and the settings of whoever watches."""
    url = f"sqlite+aiosqlite:///{tmp_path}/shared.db"
    (tmp_path / "nightschool.toml").write_text(
        f'data_dir = "data"\n[database]\nurl = "{url}"\n[[projects]]\nname = "p"\nbase_dir = "base"\nbase_name = "b"\n'
    )
    await asyncio.to_thread(migrations.upgrade, url)
    database = Database(url)
    yield database, tmp_path / "nightschool.toml"
    await database.close()


def watch(settings: Path, *options: str, stdout: int = subprocess.PIPE) -> subprocess.Popen[str]:
    command = (sys.executable, "-m", "service.cli", "night", "watch", "--settings", str(settings), *options)
    return subprocess.Popen(command, stdout=stdout, text=True, cwd=ROOT, env={**os.environ, "TERM": "xterm"})


async def running_night(database: Database) -> Night:
    one = Night(project="p", date=date(2026, 1, 1), due_at=now(), state=NightState.RUNNING)
    async with database.write() as session:
        session.add(one)
    async with database.write() as session:
        session.add(NightProgress(night_id=one.id, line=LINE))
        session.add(NightEvent(night_id=one.id, kind="alarm", detail=ALARM))
    return one


async def ends(database: Database, one: Night) -> None:
    """A moment later: a further stage, then the decision."""
    await asyncio.sleep(2.5)
    async with database.write() as session:
        session.add(StageMarker(night_id=one.id, stage="train", token=1, folder="f", digest="d", seconds=9.0))
    await asyncio.sleep(2.5)
    async with database.write() as session:
        await states.move(session, one.id, NightState.REJECTED, reason="it forgot", hint="look")


async def test_a_pipe_gets_lines_to_the_end_of_the_night(elsewhere: tuple[Database, Path]) -> None:
    """No cursor moves, one line a change, the reason last; and JSON that a program can read."""
    database, settings = elsewhere
    one = await running_night(database)
    told, as_json = watch(settings), watch(settings, "--json")
    firsts = [await asyncio.to_thread(process.stdout.readline) for process in (told, as_json) if process.stdout]
    await ends(database, one)
    rests = [(await asyncio.to_thread(process.communicate))[0] for process in (told, as_json)]
    lines, objects = (first + rest for first, rest in zip(firsts, rests, strict=True))
    assert (told.returncode, as_json.returncode) == (0, 0)
    assert "\x1b" not in lines
    assert "step 120/400" in lines.splitlines()[0]
    assert lines.splitlines()[-1] == "p 2026-01-01: REJECTED  it forgot"
    seen = [json.loads(line) for line in objects.splitlines()]
    assert seen[0]["live"]["step"] == 120
    assert seen[0]["alarms"][0]["action"] == "slow_down"
    assert (seen[-1]["state"], seen[-1]["finished"], seen[-1]["live"]) == ("REJECTED", {"train": 9.0}, None)


async def test_a_terminal_gets_a_bar(elsewhere: tuple[Database, Path]) -> None:
    """Drawn anew, ended with the decision."""
    database, settings = elsewhere
    one = await running_night(database)
    ours, theirs = pty.openpty()
    process = watch(settings, stdout=theirs)
    os.close(theirs)
    text = ""
    ending = None
    while True:
        try:
            text += (await asyncio.to_thread(os.read, ours, 65536)).decode(errors="replace")
        except OSError:  # the other end is closed
            break
        if ending is None and "120/400" in text:
            ending = asyncio.create_task(ends(database, one))
    os.close(ours)
    assert process.wait(30) == 0
    assert "━" in text
    assert "\x1b[" in text
    assert "it forgot" in text


def test_when_no_night_runs_it_says_so_and_ends(tmp_path: Path) -> None:
    """No process, no night: one sentence with the command that makes one; as JSON, running is false."""
    settings = tmp_path / "nightschool.toml"
    settings.write_text('data_dir = "data"\n[[projects]]\nname = "p"\nbase_dir = "base"\nbase_name = "b"\n')
    process = watch(settings)
    assert "has had no night yet" in process.communicate(timeout=200)[0]
    assert process.returncode == 0
    found = json.loads(watch(settings, "--json").communicate(timeout=200)[0])
    assert found == {"project": "p", "running": False, "newest": None}
