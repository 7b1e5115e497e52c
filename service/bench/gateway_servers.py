"""The servers that the gateway bench compares, each a process with one worker, all before the same engine.

What is compared has a processor of its own, one and the same for every side; the engine and the load have the others.
"""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx
import msgspec

from service.bench.figure import Say
from service.bench.load import Load, Seen
from service.bench.own_gateway import BASE, PROJECT
from service.children import Child
from service.servers import HOST, free_ports

ROOT = Path(__file__).resolve().parents[2]
LITELLM_KEY = "sk-bench"
READY_SECONDS = 120.0
CURE = "The log tells why it does not start."


@dataclass(frozen=True)
class Side:
    """One server, and what a request to it looks like."""

    name: str
    url: str
    model: str
    key: str = ""

    def load(self, connections: int, seconds: float = 0.0, **body: object) -> Load:
        messages = [
            {"role": "system", "content": "You answer customers of a shop for garden tools, briefly and politely."},
            {"role": "user", "content": "My hedge trimmer stops after a minute. The battery is full. What can I do?"},
        ]
        asked = {"model": self.model, "messages": messages, "temperature": 0.7, "max_tokens": 96, **body}
        url = f"{self.url}/v1/chat/completions"
        return Load(url, msgspec.json.encode(asked).decode(), connections, seconds, self.key)


@dataclass(frozen=True)
class Servers:
    """`litellm` is None where its environment is missing."""

    engine: Side
    ours: Side
    bare: Side
    litellm: Side | None


def litellm_command() -> Path | None:
    """In .venv-bench beside our environment or the checkout: `make bench` installs it there."""
    found = (folder / ".venv-bench" / "bin" / "litellm" for folder in (Path(sys.prefix).parent, ROOT))
    return next((command for command in found if command.exists()), None)


def processors() -> tuple[set[int], set[int]]:
    """For what is compared, and for the rest; the same one where there is only one."""
    first, *rest = sorted(os.sched_getaffinity(0))
    return {first}, set(rest) or {first}


@contextmanager
def on(which: set[int]) -> Iterator[None]:
    """Processes started within run on these processors only."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, which)
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


@asynccontextmanager
async def servers(folder: Path, say: Say) -> AsyncIterator[Servers]:
    compared, others = processors()
    ports = free_ports(4)
    urls = [f"http://{HOST}:{port}" for port in ports]
    engine, own, bare, litellm = (str(port) for port in ports)
    async with AsyncExitStack() as closing:

        async def start(name: str, command: Sequence[str], url: str, health: str, where: set[int]) -> None:
            with on(where):
                child = Child.start(name, command, environment=_environment(), log_path=folder / f"{name}.log")
            closing.push_async_callback(child.stop)
            await _ready(child, url + health)

        async def ours(name: str, module: str, *arguments: str, where: set[int]) -> None:
            command = (sys.executable, "-m", f"service.bench.{module}", *arguments)
            await start(name, command, f"http://{HOST}:{arguments[0]}", "/health", where)

        await ours("engine", "instant_engine", engine, where=others)
        await ours("bare", "passthrough", bare, urls[0], where=compared)
        data = folder / "data"
        data.mkdir()
        await ours("gateway", "own_gateway", own, urls[0], str(data), where=compared)
        found = litellm_command()
        if found is not None:
            say("gateway: starting LiteLLM")
            settings = folder / "litellm.json"
            settings.write_bytes(msgspec.json.encode(_litellm_settings(urls[0])))
            command = (str(found), "--config", str(settings), "--host", HOST, "--port", litellm, "--num_workers", "1")
            await start("litellm", command, urls[3], "/health/liveliness", compared)
        yield Servers(
            engine=Side("direct", urls[0], BASE),
            ours=Side("gateway", urls[1], PROJECT, (data / "key").read_text(encoding="utf-8")),
            bare=Side("pass-through", urls[2], BASE),
            litellm=Side("LiteLLM", urls[3], PROJECT, LITELLM_KEY) if found else None,
        )


async def measure(load: Load) -> Seen:
    """The load comes from a process of its own, beside the engine."""
    with on(processors()[1]):
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            "service.bench.load",
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            cwd=ROOT,
        )
    said, _ = await process.communicate(msgspec.json.encode(load))
    return msgspec.json.decode(said, type=Seen)


def _litellm_settings(engine: str) -> Mapping[str, object]:
    """JSON is YAML. A key is asked for, the name is an alias; nothing is switched on that costs it time."""
    served = {"model": f"openai/{BASE}", "api_base": f"{engine}/v1", "api_key": "none"}
    return {
        "model_list": [{"model_name": PROJECT, "litellm_params": served}],
        "general_settings": {"master_key": LITELLM_KEY},
        "litellm_settings": {"telemetry": False, "set_verbose": False},
    }


def _environment() -> Mapping[str, str]:
    return {
        "PYTHONPATH": str(ROOT),
        "PYTHONUNBUFFERED": "1",
        "LITELLM_MODE": "PRODUCTION",
        "LITELLM_LOG": "ERROR",
        "LITELLM_LOCAL_MODEL_COST_MAP": "True",  # nothing is fetched at the start
        "DO_NOT_TRACK": "1",
    }


async def _ready(child: Child, url: str) -> None:
    async with httpx.AsyncClient(timeout=5.0, trust_env=False) as client:

        async def answers() -> bool:
            try:
                return (await client.get(url)).status_code == httpx.codes.OK
            except httpx.TransportError:
                return False

        await child.wait_ready(answers, READY_SECONDS, CURE)
