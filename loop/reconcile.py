"""Every replica holds what it should: forgotten adapters are loaded again, ours that nobody needs are unloaded.

vLLM forgets at each restart what was loaded at run time; each adapter that it keeps costs a place among its slots.
"""

from __future__ import annotations

import asyncio
import re
from pathlib import Path
from typing import ClassVar

import structlog
from sqlmodel import col, select

from labeling.errors import NightschoolError, Refused
from loop.adapter_files import adapter_digest
from loop.clients import Clients
from loop.settings import ProjectSettings
from loop.tables import Adapter, Night, NightState, Serving
from loop.vllm import Replica

log = structlog.get_logger()
BUSY = (NightState.RUNNING, NightState.AWAITING_APPROVAL, NightState.PROMOTING)


class AdapterChanged(Refused):
    code: ClassVar[str] = "adapter_changed"
    default_hint = "Put the files back from the archive; nothing was loaded."


class BaseNotServed(Refused):
    code: ClassVar[str] = "base_not_served"
    default_hint = "Start that vLLM with --served-model-name as projects.base_name says."


async def reconcile(clients: Clients, project: ProjectSettings) -> tuple[str, ...]:
    """Gives what was unloaded anywhere. A replica that is down is left for the next look."""
    done = await asyncio.gather(
        *(_reconcile(clients, project, replica) for replica in clients.replicas), return_exceptions=True
    )
    unloaded: set[str] = set()
    for replica, result in zip(clients.replicas, done, strict=True):
        if isinstance(result, NightschoolError):
            log.warning("replica_not_reconciled", replica=replica.url, code=result.code, reason=str(result))
        elif isinstance(result, BaseException):
            raise result
        else:
            unloaded |= result
    return tuple(sorted(unloaded))


async def ensure_loaded(replica: Replica, project: ProjectSettings, adapter: Adapter) -> bool:
    """Loads it when the replica does not have it, its files being what they were; gives whether it had to."""
    if project.served_name(adapter.name) in await replica.models():
        return False
    if adapter.folder is None:
        raise BaseNotServed(f"vLLM at {replica.url} does not serve the base {project.base_name!r}")
    if await asyncio.to_thread(adapter_digest, Path(adapter.folder)) != adapter.digest:
        raise AdapterChanged(f"the files in {adapter.folder} are no longer those of {adapter.name}")
    await replica.load(adapter.name, Path(adapter.folder))
    return True


async def _reconcile(clients: Clients, project: ProjectSettings, replica: Replica) -> set[str]:
    # The replica first, our tables second: a night's row is written before its adapter is loaded anywhere.
    there = await replica.models()
    wanted, spared = await _wanted(clients, project)
    for adapter in wanted:
        if adapter.folder is not None and await ensure_loaded(replica, project, adapter):
            log.warning("adapter_was_forgotten", replica=replica.url, adapter=adapter.name)
    ours = re.compile(rf"{re.escape(project.name)}@v[0-9]+")
    kept = {adapter.name for adapter in wanted} | spared
    strangers = {name for name in there if ours.fullmatch(name) and name not in kept}
    idle = {name for name in strangers if not clients.aliases.in_flight(name)}
    for name in sorted(idle):
        await replica.unload(name)
    return idle


async def _wanted(clients: Clients, project: ProjectSettings) -> tuple[list[Adapter], set[str]]:
    """What must be there (current, previous), and names that a night is using just now."""
    async with clients.database.read() as session:
        serving = await session.get(Serving, project.name)
        names = [name for name in (serving.current, serving.previous) if name] if serving else []
        wanted = await session.execute(select(Adapter).where(col(Adapter.name).in_(names)))
        busy = await session.execute(
            select(Adapter.name)
            .join(Night, col(Night.id) == col(Adapter.night_id))
            .where(col(Night.project) == project.name, col(Night.state).in_(BUSY))
        )
        return list(wanted.scalars()), set(busy.scalars())
