"""Processes that we start and end: each runs under a watchdog, so that none outlives us, however we die.

Not for work that has a result: trainers and the examination are started by `loop.executors`.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from labeling.errors import Unavailable
from loop.executors import INHERITED
from service import watchdog

GRACE_SECONDS = 10.0
POLL_SECONDS = 0.1
LOG_LINES_SHOWN = 12
LOG_BYTES_READ = 20_000

Check = Callable[[], Awaitable[bool]]


class ServerFailed(Unavailable):
    """A process of ours ended, or was not ready in time; the message carries the end of its log."""

    code = "server_failed"


@dataclass(frozen=True)
class Child:
    """One command under its watchdog. Bound to no event loop: any one may wait for it or stop it."""

    name: str
    log_path: Path
    grace_seconds: float
    _watchdog: subprocess.Popen[bytes] = field(repr=False)

    @classmethod
    def start(
        cls,
        name: str,
        command: Sequence[str],
        *,
        environment: Mapping[str, str],
        log_path: Path,
        cwd: Path | None = None,
        grace_seconds: float = GRACE_SECONDS,
    ) -> Child:
        """Of our own environment the command sees only what any program needs; the rest comes in `environment`.

        `grace_seconds` lie between being asked to end and being killed. A command that cannot be started ends at once.
        """
        log_path.parent.mkdir(parents=True, exist_ok=True)
        inherited = {key: os.environ[key] for key in INHERITED if key in os.environ}
        with log_path.open("ab") as log:
            process = subprocess.Popen(
                # Isolated and without site-packages: there in 20 ms, whatever the command's environment holds.
                [sys.executable, "-I", "-S", watchdog.__file__, str(grace_seconds), *command],
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=log,
                cwd=cwd,
                env={**inherited, **environment},
                start_new_session=True,  # out of reach of our terminal's Ctrl-C: we end our children in order
            )
        return cls(name, log_path, grace_seconds, process)

    @property
    def returncode(self) -> int | None:
        """The command's; None while it, or anything that it left behind, still runs."""
        return self._watchdog.poll()

    async def ended(self) -> int:
        while (status := self.returncode) is None:  # noqa: ASYNC110  # nobody tells us: the child is bound to no loop
            await asyncio.sleep(POLL_SECONDS)
        self._let_go()
        return status

    async def wait_ready(self, check: Check, timeout_seconds: float, cure: str = "") -> None:
        """`check` answers True once the child works. Raises ServerFailed when it ends first, or takes too long."""
        deadline = time.monotonic() + timeout_seconds
        while not await check():
            if self.returncode is not None:
                raise ServerFailed(f"{self.name} ended with status {self.returncode}: {self.last_lines()}", hint=cure)
            if time.monotonic() > deadline:
                raise ServerFailed(
                    f"{self.name} was not ready after {timeout_seconds:.0f} s; its log ends: {self.last_lines()}",
                    hint=cure,
                )
            await asyncio.sleep(POLL_SECONDS)

    async def stop(self) -> None:
        """Ends the command with all its descendants, wherever they moved; done is done."""
        self.ask_to_stop()
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self.ended(), self.grace_seconds + 2 * watchdog.KILL_SECONDS)

    def ask_to_stop(self) -> None:
        """Returns at once."""
        if self.returncode is None:
            self._watchdog.send_signal(signal.SIGTERM)
        self._let_go()

    def _let_go(self) -> None:
        """Closes the pipe: a watchdog that still runs ends its command, as if we were gone."""
        assert self._watchdog.stdin is not None
        self._watchdog.stdin.close()

    def last_lines(self) -> str:
        """The end of the log, on one line, and where the rest is."""
        try:
            with self.log_path.open("rb") as log:
                log.seek(max(0, self.log_path.stat().st_size - LOG_BYTES_READ))
                lines = log.read().decode(errors="replace").splitlines()
        except OSError:
            return f"(no log at {self.log_path})"
        return f"{' | '.join(line.strip() for line in lines[-LOG_LINES_SHOWN:] if line.strip())} (log: {self.log_path})"
