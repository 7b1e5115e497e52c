"""Runs one command and leaves nothing of it behind: not when it ends, not when its starter is killed with SIGKILL.

A process of its own, standard library only, started by `service.children` with a pipe as standard input: end of file
there means that the starter is gone. `python watchdog.py GRACE_SECONDS COMMAND...` ends with the command's status.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import select
import signal
import subprocess
import sys
import time
from pathlib import Path

PR_SET_PDEATHSIG = 1
PR_SET_CHILD_SUBREAPER = 36
NOT_STARTED = 127
KILL_SECONDS = 10.0


def main() -> int:
    grace_seconds, command = float(sys.argv[1]), sys.argv[2:]
    wakeup = _signals_as_bytes()
    _prctl(PR_SET_CHILD_SUBREAPER, 1)  # whatever the command's children orphan becomes ours
    try:
        child = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            start_new_session=True,
            preexec_fn=_end_with_watchdog,  # noqa: PLW1509  # this process has one thread
        )
    except OSError as error:
        sys.stderr.write(f"{command[0]} could not be started: {error.strerror}\n")
        return NOT_STARTED
    _wait(child, wakeup)
    _end(child, grace_seconds)
    status = child.returncode or 0
    return 128 - status if status < 0 else status


def _signals_as_bytes() -> int:
    """Each signal that concerns us writes its number into the pipe whose reading end this gives."""
    reading, writing = os.pipe()
    os.set_blocking(reading, False)
    os.set_blocking(writing, False)
    signal.set_wakeup_fd(writing)
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGCHLD):
        signal.signal(number, lambda *_: None)
    return reading


def _wait(child: subprocess.Popen[bytes], wakeup: int) -> None:
    """Until the command has ended, the starter is gone, or somebody asks us to stop."""
    starter = sys.stdin.fileno()
    while _running(child):
        readable, _, _ = select.select([starter, wakeup], [], [])
        if starter in readable and not os.read(starter, 1024):
            return
        if wakeup in readable and set(os.read(wakeup, 1024)) - {signal.SIGCHLD}:
            return


def _end(child: subprocess.Popen[bytes], grace_seconds: float) -> None:
    """The command's group is asked first; what it leaves behind is asked next; the rest is killed."""
    deadline = time.monotonic() + grace_seconds
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child.pid, signal.SIGTERM)
    while _running(child) and time.monotonic() < deadline:
        time.sleep(0.02)
    _signal_all(signal.SIGTERM)
    while _running(child) + len(descendants()) and time.monotonic() < deadline:
        time.sleep(0.02)
    deadline = time.monotonic() + KILL_SECONDS
    while _running(child) + len(descendants()) and time.monotonic() < deadline:
        _signal_all(signal.SIGKILL)  # again and again: some may fork meanwhile
        time.sleep(0.01)


def _running(child: subprocess.Popen[bytes]) -> bool:
    """Reaps all that have ended, adopted orphans too; keeps the command's status."""
    with contextlib.suppress(ChildProcessError):
        while True:
            pid, status = os.waitpid(-1, os.WNOHANG)
            if pid == 0:
                break
            if pid == child.pid:
                child.returncode = os.waitstatus_to_exitcode(status)
    return child.returncode is None


def _signal_all(number: signal.Signals) -> None:
    for pid in descendants():
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)


def descendants() -> list[int]:
    """Living ones of this process, at any depth, whatever group or session they moved to."""
    children: dict[int, list[int]] = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            # The name in parentheses may hold anything, also spaces and parentheses.
            state, parent = stat.read_text(errors="replace").rpartition(")")[2].split()[:2]
            if state != "Z":
                children.setdefault(int(parent), []).append(int(stat.parent.name))
    found, waiting = [], [os.getpid()]
    while waiting:
        of_one = children.get(waiting.pop(), [])
        found += of_one
        waiting += of_one
    return found


def _end_with_watchdog() -> None:
    """In the command's process, before it starts: should the watchdog itself be killed, the command is asked to end."""
    _prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


def _prctl(option: int, value: int) -> None:
    ctypes.CDLL(None).prctl(option, value, 0, 0, 0)


if __name__ == "__main__":
    sys.exit(main())
