"""Where heavy work runs: a child process on this machine. Trainers and the examination are started through here.

A child gets a spec file, writes JSON lines on stdout (progress, at the end perhaps an error) and its log on stderr.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from labeling.errors import NightschoolError
from loop.process_tree import PROC, descendants

MAX_LINE_BYTES = 1 << 20
SECONDS_TO_END = 5.0
LOG_LINES_SHOWN = 5
# All that a child sees of our own environment: secrets stay here.
INHERITED = (
    *("PATH", "HOME", "LANG", "LC_ALL", "TZ", "TMPDIR", "LD_LIBRARY_PATH", "LD_PRELOAD"),
    *("CUDA_HOME", "CUDA_VISIBLE_DEVICES", "CUDA_DEVICE_ORDER", "NVIDIA_VISIBLE_DEVICES"),
    *("NCCL_DEBUG", "NCCL_P2P_DISABLE", "NCCL_SHM_DISABLE", "NCCL_NVLS_ENABLE", "NCCL_CUMEM_ENABLE"),
)
GIVEN = {
    "HF_HUB_OFFLINE": "1",
    "TRANSFORMERS_OFFLINE": "1",
    "HF_DATASETS_OFFLINE": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "DO_NOT_TRACK": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "PYTHONUNBUFFERED": "1",
    # A thread that waits for its fellow gives up the core soon: beside a busy engine, a spinning one stops both.
    "GOMP_SPINCOUNT": "10000",
}
CACHES = {
    "HF_HOME": "huggingface",
    "TRITON_CACHE_DIR": "triton",
    "TORCHINDUCTOR_CACHE_DIR": "inductor",
    "UNSLOTH_COMPILE_LOCATION": "unsloth",
}

OnProgress = Callable[[dict[str, Any]], None]
OnStart = Callable[["ChildControl"], None]


class ChildFailed(NightschoolError):
    """The child said what was wrong, in an error line; `child_code` is its word for it."""

    code = "child_failed"

    def __init__(self, message: str, *, child_code: str, hint: str | None = None) -> None:
        super().__init__(message, hint=hint)
        self.child_code = child_code


class ChildCrashed(NightschoolError):
    """The child ended without saying why; the message carries the end of its log."""

    code = "child_crashed"


class ChildNotStarted(NightschoolError):
    code = "child_not_started"
    default_hint = "trainer.python must name the Python of an environment in which nightschool is installed."


@dataclass(frozen=True)
class ChildControl:
    """What its starter may do to a running child and all its own children. Nothing happens to one that has ended."""

    group: int  # the child's own process id: it leads its group

    def pause(self) -> None:
        """It keeps its memory, the accelerator's too, and does nothing. It still dies with us."""
        _signal_tree(self.group, signal.SIGSTOP)

    def go_on(self) -> None:
        _signal_tree(self.group, signal.SIGCONT)

    def park(self) -> bool:
        """A trainer writes a checkpoint after its step, and ends as `parked`. Told to it alone, which tells its ranks:
        compilers that it has started know no such signal, and would die of it.

        False: it does not listen, having hardly begun, or ended; the signal, which would have killed it, was not sent.
        """
        if not _catches(self.group, signal.SIGUSR1):
            return False
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.group, signal.SIGUSR1)
        self.go_on()
        return True


def trainer_caches(data_dir: Path) -> dict[str, str]:
    """Variables that put what a trainer compiles and caches in one place, kept over nights: compiling takes minutes."""
    return {name: str(data_dir / "cache" / "trainer" / folder) for name, folder in CACHES.items()}


def _nothing(control: ChildControl) -> None:
    return


class Executor(Protocol):
    """Runs `python -m MODULE SPEC` somewhere until it ends; raises unless it ended well."""

    async def run(
        self,
        module: str,
        spec_path: Path,
        *,
        on_progress: OnProgress,
        log_path: Path,
        environment: Mapping[str, str],
        python: str = "",
        on_start: OnStart = _nothing,
    ) -> None: ...


@dataclass(frozen=True)
class LocalExecutor:
    """On this machine. The child is killed with us and when the caller is cancelled."""

    async def run(
        self,
        module: str,
        spec_path: Path,
        *,
        on_progress: OnProgress,
        log_path: Path,
        environment: Mapping[str, str],
        python: str = "",
        on_start: OnStart = _nothing,
    ) -> None:
        """`python`: of another environment; "" is this one. Raises ChildFailed, ChildCrashed or ChildNotStarted."""
        command = (python or sys.executable, "-m", module, str(spec_path), "--parent", str(os.getpid()))
        log_path.parent.mkdir(parents=True, exist_ok=True)
        with log_path.open("ab") as log:
            child = await _start(command, log.fileno(), environment)
            on_start(ChildControl(child.pid))
            try:
                error = await _read_lines(child, on_progress, log_path)
                status = await child.wait()
            finally:
                await _end(child)
        if status != 0 or error is not None:
            raise _failure(module, status, error, log_path)


async def _start(command: tuple[str, ...], log: int, environment: Mapping[str, str]) -> asyncio.subprocess.Process:
    inherited = {name: os.environ[name] for name in INHERITED if name in os.environ}
    try:
        return await asyncio.create_subprocess_exec(
            *command,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=log,
            env={**inherited, **GIVEN, **environment},
            start_new_session=True,  # a group of its own: ended as a whole, and out of reach of our terminal's Ctrl-C
            limit=MAX_LINE_BYTES,
        )
    except OSError as error:
        raise ChildNotStarted(f"{command[0]} could not be started: {error.strerror}") from None


async def _read_lines(
    child: asyncio.subprocess.Process, on_progress: OnProgress, log_path: Path
) -> dict[str, Any] | None:
    """Until stdout closes; gives the error line, if there was one."""
    assert child.stdout is not None
    error = None
    async for line in child.stdout:
        try:
            told = json.loads(line)
        except ValueError:
            told = None
        if not isinstance(told, dict):
            with log_path.open("ab") as log:  # not for us: something printed by the way
                log.write(line)
        elif "error" in told:
            error = told["error"]
        else:
            on_progress(told)
    return error


async def _end(child: asyncio.subprocess.Process) -> None:
    """The whole group: asked first, then killed. Nothing is left behind, also when a grandchild hangs."""
    if child.returncode is None:
        _signal(child.pid, signal.SIGTERM)
        _signal_tree(child.pid, signal.SIGCONT)  # a paused one would not hear it
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(child.wait(), SECONDS_TO_END)
    (_signal_tree if child.returncode is None else _signal)(child.pid, signal.SIGKILL)
    await child.wait()


def _catches(process: int, number: signal.Signals) -> bool:
    try:
        status = (PROC / str(process) / "status").read_text(encoding="ascii", errors="replace")
    except OSError:
        return False
    mask = next((line.split()[1] for line in status.splitlines() if line.startswith("SigCgt:")), "0")
    return bool(int(mask, 16) >> (number - 1) & 1)


def _signal(group: int, number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(group, number)


def _signal_tree(leader: int, number: signal.Signals) -> None:
    """Also those below it that lead groups of their own, as a launcher's ranks do."""
    below = descendants(leader)
    _signal(leader, number)
    for process in below:
        with contextlib.suppress(ProcessLookupError):
            os.kill(process, number)


def _failure(module: str, status: int, error: dict[str, Any] | None, log_path: Path) -> NightschoolError:
    if error is not None:
        return ChildFailed(str(error["message"]), child_code=str(error["code"]), hint=str(error["hint"]))
    last = " | ".join(log_path.read_text(errors="replace").splitlines()[-LOG_LINES_SHOWN:])
    if status == -signal.SIGKILL:
        return ChildCrashed(
            f"{module} was killed (SIGKILL)", hint=f"Mostly the machine ran out of memory. The log: {log_path}"
        )
    return ChildCrashed(f"{module} ended with status {status}: {last}", hint=f"The whole log: {log_path}")
