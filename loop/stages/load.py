"""The candidate's files are checked again and loaded on every replica under their immutable name."""

from __future__ import annotations

import asyncio
from pathlib import Path

from labeling.errors import Refused
from loop.adapter_files import check, read_base_config
from loop.outputs import Loaded, Registered
from loop.stage import StageContext
from loop.tables import Adapter
from loop.vllm import Replica

CANARY = [{"role": "user", "content": "Say hello."}]
CANARY_TOKENS = 4


class AdapterChanged(Refused):
    code = "adapter_changed"
    default_hint = "The files in the adapters folder are not what was examined: put them back from the archive."


class BasePoisoned(Refused):
    code = "base_poisoned"
    default_hint = "Restart that vLLM: an adapter has made it answer nothing, and unloading does not heal it."


async def run(context: StageContext) -> Loaded:
    registered = context.take(Registered)
    folder = Path(registered.folder)
    await _unchanged(context, registered.adapter, folder)
    replicas = context.clients.replicas
    await asyncio.gather(
        *(_load(replica, registered.adapter, folder, context.project.base_name) for replica in replicas)
    )
    return Loaded(adapter=registered.adapter, replicas=tuple(replica.url for replica in replicas))


async def _unchanged(context: StageContext, name: str, folder: Path) -> None:
    """What is loaded has the digest that the gate saw, and no NaN that would poison a whole engine."""
    project = context.project
    files = check(
        folder,
        read_base_config(project.base_dir),
        max_rank=context.engine.max_lora_rank,
        target_modules=project.trainer.target_modules,
    )
    async with context.clients.database.read() as session:
        row = await session.get(Adapter, name)
    if row is None or row.digest != files.digest:
        raise AdapterChanged(f"{folder} has digest {files.digest}, not that of {name}")


async def _load(replica: Replica, name: str, folder: Path, base_name: str) -> None:
    await replica.load(name, folder)
    for served in (name, base_name):
        answer = await replica.ask(served, CANARY, max_tokens=CANARY_TOKENS)
        if served == base_name and not answer.text.strip():
            raise BasePoisoned(f"{replica.url} answers nothing as {served} since {name} was loaded")
