"""The candidate's files are checked again and loaded on every replica under their immutable name."""

from __future__ import annotations

from pathlib import Path

from loop.adapter_files import check, read_base_config
from loop.engine_check import base_stays_base, canary
from loop.outputs import Loaded, Registered
from loop.reconcile import AdapterChanged, ensure_loaded
from loop.stage import StageContext
from loop.tables import Adapter


async def run(context: StageContext) -> Loaded:
    """One replica after the other: what would make an engine ill makes one ill, and the others serve on."""
    adapter = await _checked(context)
    project = context.project
    for replica in context.clients.replicas:
        context.progress({"doing": f"loading {adapter.name} on {replica.url}"})
        await ensure_loaded(replica, project, adapter)
        await replica.log_probabilities(adapter.name, "Hello")  # the first request to it, before the base is looked at
        await canary(replica, project.base_name)
        if context.engine.device == "cpu":
            await base_stays_base(replica, project.base_name, adapter.name)
    return Loaded(adapter=adapter.name, replicas=tuple(replica.url for replica in context.clients.replicas))


async def _checked(context: StageContext) -> Adapter:
    """The row of what is loaded; its files are those that the gate saw, and nothing in them poisons an engine."""
    registered, project = context.take(Registered), context.project
    folder = Path(registered.folder)
    files = check(
        folder,
        read_base_config(project.base_dir),
        max_rank=context.engine.max_lora_rank,
        target_modules=project.trainer.target_modules,
    )
    async with context.clients.database.read() as session:
        row = await session.get(Adapter, registered.adapter)
    if row is None or row.digest != files.digest:
        raise AdapterChanged(f"the files in {folder} are no longer those of {registered.adapter}")
    return row
