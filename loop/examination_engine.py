"""The engine on which a night's candidate is examined: the first replica, or a vLLM of our own for the stage's time."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import os
import signal
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from labeling.errors import Unavailable
from loop.engine_process import HOST, engine_command, engine_environment
from loop.settings import EngineSettings, ProjectSettings
from loop.vllm import EngineUnavailable, Replica

if TYPE_CHECKING:
    from loop.stage import StageContext  # with all outside systems; an engine alone needs none

INHERITED = (
    *("PATH", "HOME", "LANG", "TZ", "TMPDIR", "LD_LIBRARY_PATH", "LD_PRELOAD"),
    *("CUDA_HOME", "CUDA_VISIBLE_DEVICES", "NVIDIA_VISIBLE_DEVICES"),
)
SECONDS_TO_END = 20.0
PR_SET_PDEATHSIG = 1


class EngineNotStarted(Unavailable):
    code = "examination_engine_not_started"
    default_hint = 'Look at the log; with too little memory for a second vLLM set vllm.examination = "replica".'


@asynccontextmanager
async def examination_engine(context: StageContext) -> AsyncIterator[Replica]:
    """Same flags and dtype as production; it ends with the block."""
    if context.engine.examination == "replica":
        yield context.clients.replicas[0]
        return
    async with own_engine(context.engine, context.project, context.folder / "engine.log") as replica:
        yield replica


@asynccontextmanager
async def own_engine(settings: EngineSettings, project: ProjectSettings, log_path: Path) -> AsyncIterator[Replica]:
    port = _free_port()
    command = engine_command(settings, project.base_dir, project.base_name, port, project.chat_template)
    inherited = {name: os.environ[name] for name in INHERITED if name in os.environ}
    key = settings.api_key.get_secret_value() if settings.api_key else None
    with log_path.open("ab") as log:
        child = await asyncio.create_subprocess_exec(
            *command,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            env={**inherited, **engine_environment(settings)},
            start_new_session=True,
            preexec_fn=_end_with_parent,
        )
    replica = Replica(f"http://{HOST}:{port}", api_key=key)
    try:
        await _ready(child, replica, settings.start_timeout_seconds, log_path)
        yield replica
    finally:
        await replica.close()
        await _end(child)


def _end_with_parent() -> None:
    """Also when we are killed: vLLM gets SIGTERM then and takes its two children with it."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        port: int = probe.getsockname()[1]
    return port


async def _ready(child: asyncio.subprocess.Process, replica: Replica, seconds: float, log_path: Path) -> None:
    loop = asyncio.get_running_loop()
    deadline = loop.time() + seconds
    while loop.time() < deadline:
        if child.returncode is not None:
            raise EngineNotStarted(f"the examination's vLLM ended with status {child.returncode}; its log: {log_path}")
        try:
            return await replica.health()
        except EngineUnavailable:
            await asyncio.sleep(0.5)
    raise EngineNotStarted(f"the examination's vLLM was not ready after {seconds:.0f} s; its log: {log_path}")


async def _end(child: asyncio.subprocess.Process) -> None:
    if child.returncode is None:
        os.killpg(child.pid, signal.SIGTERM)
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(child.wait(), SECONDS_TO_END)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child.pid, signal.SIGKILL)
    await child.wait()
