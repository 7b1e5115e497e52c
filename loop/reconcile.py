"""Every replica holds what it should: forgotten adapters are loaded again, ours that nobody needs are unloaded."""

from __future__ import annotations

import asyncio
import re
from pathlib import Path

import structlog
from sqlmodel import col, select

from labeling.errors import NightschoolError
from loop.clients import Clients
from loop.settings import ProjectSettings
from loop.tables import Adapter, Night, NightState, Serving
from loop.vllm import Replica

log = structlog.get_logger()
BUSY = (NightState.RUNNING, NightState.AWAITING_APPROVAL, NightState.PROMOTING)


async def reconcile(clients: Clients, project: ProjectSettings) -> tuple[str, ...]:
    """Gives what was unloaded. A replica that is down is left for the next look."""
    wanted, spared = await _wanted(clients, project)
    pattern = re.compile(rf"{re.escape(project.name)}@v[0-9]+")
    done = await asyncio.gather(
        *(_one(clients, replica, wanted, spared, pattern) for replica in clients.replicas), return_exceptions=True
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


async def _wanted(clients: Clients, project: ProjectSettings) -> tuple[dict[str, Path], set[str]]:
    """Name -> folder of what must be there (current, previous), and names that a night is using just now."""
    async with clients.database.read() as session:
        serving = await session.get(Serving, project.name)
        names = [name for name in (serving.current, serving.previous) if name] if serving else []
        adapters = await session.execute(select(Adapter).where(col(Adapter.name).in_(names)))
        busy = await session.execute(
            select(Night.candidate).where(col(Night.project) == project.name, col(Night.state).in_(BUSY))
        )
        spared = {name for name in busy.scalars() if name}
        wanted = {row.name: Path(row.folder) for row in adapters.scalars() if row.folder}
    return wanted, spared


async def _one(
    clients: Clients, replica: Replica, wanted: dict[str, Path], spared: set[str], ours: re.Pattern[str]
) -> set[str]:
    there = set(await replica.models())
    for name in sorted(wanted.keys() - there):
        log.warning("adapter_forgotten", replica=replica.url, adapter=name)
        await replica.load(name, wanted[name])
    strangers = {name for name in there - wanted.keys() - spared if ours.fullmatch(name)}
    gone = set()
    for name in sorted(strangers):
        if not clients.aliases.in_flight(name):
            await replica.unload(name)
            gone.add(name)
    return gone
