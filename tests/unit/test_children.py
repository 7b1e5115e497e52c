"""Nothing that we start outlives us, however we die. Real processes, real signals."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from service.children import Child, ServerFailed

# A command with a child in its own group, one in a session of its own, and an orphan: as vLLM and daemons do.
# Each writes its pid into the folder; "stubborn" ones ignore SIGTERM.
FAMILY = """
import os, signal, sys, time
from pathlib import Path
folder, stubborn = Path(sys.argv[1]), sys.argv[2] == "stubborn"
def stay(name):
    if stubborn:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    (folder / f".{name}").write_text(str(os.getpid()))
    (folder / f".{name}").rename(folder / name)
    while True:
        time.sleep(60)
if os.fork() == 0:
    stay("same-group")
if os.fork() == 0:
    os.setsid()
    stay("own-session")
if os.fork() == 0:
    if os.fork() == 0:
        os.setsid()
        stay("orphan")
    os._exit(0)
stay("command")
"""
NAMES = ("command", "same-group", "own-session", "orphan")
STARTER = """
import asyncio, sys
from pathlib import Path
from service.children import Child
folder = Path(sys.argv[2])
child = Child.start("family", [sys.executable, "-c", sys.argv[1], str(folder), sys.argv[3]], environment={},
                    log_path=folder / "log", grace_seconds=0.5)
asyncio.run(child.ended())
"""


async def family(folder: Path) -> dict[str, int]:
    """The pids, once all are there."""
    while not all((folder / name).exists() for name in NAMES):
        await asyncio.sleep(0.02)
    return {name: int((folder / name).read_text()) for name in NAMES}


def alive(pid: int) -> bool:
    """A zombie that nobody has reaped yet is dead."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


async def all_gone(pids: dict[str, int], seconds: float) -> list[str]:
    """Names of those still alive after so long."""
    deadline = time.monotonic() + seconds
    while (left := [name for name, pid in pids.items() if alive(pid)]) and time.monotonic() < deadline:
        await asyncio.sleep(0.02)
    return left


def start(folder: Path, kind: str = "obedient", grace_seconds: float = 5.0) -> Child:
    command = [sys.executable, "-c", FAMILY, str(folder), kind]
    return Child.start("family", command, environment={}, log_path=folder / "log", grace_seconds=grace_seconds)


@pytest.mark.parametrize("kind", ["obedient", "stubborn"])
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
async def test_starter_dies_and_takes_all_with_it(tmp_path: Path, number: signal.Signals, kind: str) -> None:
    """Killed, terminated or interrupted: children, grandchildren, other sessions and orphans end too."""
    starter = subprocess.Popen([sys.executable, "-c", STARTER, FAMILY, str(tmp_path), kind], stderr=subprocess.DEVNULL)
    pids = await family(tmp_path)
    assert all(alive(pid) for pid in pids.values())
    starter.send_signal(number)
    starter.wait()
    assert await all_gone(pids, 5) == []


@pytest.mark.parametrize("kind", ["obedient", "stubborn"])
async def test_stop_ends_all(tmp_path: Path, kind: str) -> None:
    """Stopping waits until every descendant is gone; those that ignore SIGTERM are killed after the grace."""
    child = start(tmp_path, kind, grace_seconds=0.5)
    pids = await family(tmp_path)
    await child.stop()
    assert await all_gone(pids, 0) == []
    assert child.returncode == 128 + (signal.SIGTERM if kind == "obedient" else signal.SIGKILL)


async def test_what_a_command_leaves_behind_ends_with_it(tmp_path: Path) -> None:
    """A command that dies by itself is reported, and its orphans do not stay."""
    child = start(tmp_path)
    pids = await family(tmp_path)
    os.kill(pids["command"], signal.SIGKILL)
    assert await child.ended() == 128 + signal.SIGKILL
    assert await all_gone(pids, 0) == []


async def test_watchdog_killed_ends_the_command(tmp_path: Path) -> None:
    """Even with the watchdog shot, the command itself is asked to end."""
    child = start(tmp_path)
    pids = await family(tmp_path)
    child._watchdog.kill()
    assert await all_gone({"command": pids["command"]}, 5) == []
    for name in NAMES[1:]:  # nobody is left to end these: this test is
        os.kill(pids[name], signal.SIGKILL)


async def test_stopping_twice_is_stopping_once(tmp_path: Path) -> None:
    """Stop is safe on a child that has ended."""
    child = start(tmp_path)
    await family(tmp_path)
    await child.stop()
    await child.stop()


async def test_environment_is_what_was_given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Secrets of our own environment do not reach a child; those given to it do."""
    monkeypatch.setenv("OUR_SECRET", "1")
    child = Child.start("env", ["env"], environment={"GIVEN": "2"}, log_path=tmp_path / "log")
    assert await child.ended() == 0
    seen = (tmp_path / "log").read_text().splitlines()
    assert "GIVEN=2" in seen
    assert not any(line.startswith("OUR_SECRET") for line in seen)


async def never() -> bool:
    return False


async def test_ended_before_ready_shows_the_log(tmp_path: Path) -> None:
    """The error names the child, its status, the last lines of its log and the cure."""
    child = Child.start(
        "printer", ["sh", "-c", "echo no ink >&2; exit 3"], environment={}, log_path=tmp_path / "printer.log"
    )
    with pytest.raises(ServerFailed, match=r"printer ended with status 3: no ink .*printer\.log") as failed:
        await child.wait_ready(never, 20, "Fill it.")
    assert failed.value.hint == "Fill it."


async def test_a_missing_command_says_so(tmp_path: Path) -> None:
    """The name of the program and the system's reason stand in the error."""
    child = Child.start("x", ["/nowhere/program"], environment={}, log_path=tmp_path / "log")
    with pytest.raises(ServerFailed, match="status 127: /nowhere/program could not be started: No such file"):
        await child.wait_ready(never, 20)


async def test_too_slow_is_an_error(tmp_path: Path) -> None:
    """A child that never gets ready is reported in time and can still be stopped."""
    child = start(tmp_path)
    pids = await family(tmp_path)
    with pytest.raises(ServerFailed, match="not ready after 0 s"):
        await child.wait_ready(never, 0.3)
    await child.stop()
    assert await all_gone(pids, 0) == []


async def test_a_log_that_was_deleted_is_no_trouble(tmp_path: Path) -> None:
    """logs/ may be deleted while a server runs; its restart must not fail for that."""
    child = Child.start("short", [sys.executable, "-c", ""], environment={}, log_path=tmp_path / "logs" / "short.log")
    await child.ended()
    (tmp_path / "logs" / "short.log").unlink()
    assert "no log" in child.last_lines()
