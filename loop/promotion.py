"""Approval, refusal, roll back: by a person here, or by an alias moved in MLflow, which is a request and no more.

An alias is honoured only with evidence of that very adapter, gathered against what serves now; otherwise it is put back
and the version is tagged with the reason.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import structlog
from sqlmodel import col, select

from labeling.database import now
from labeling.errors import Conflict, NightschoolError, NotFound, Refused
from loop import approval, states
from loop.clients import Clients
from loop.serving import follow, get_adapter, get_serving, switch_to
from loop.settings import ProjectSettings
from loop.tables import Adapter, Evidence, Night, NightState, Serving

log = structlog.get_logger()
UNATTRIBUTED = "mlflow (unattributed)"


class NotPromotable(Refused):
    code = "not_promotable"


class NoWayBack(Conflict):
    code = "no_way_back"


@dataclass(frozen=True)
class ApprovalRequest:
    night_id: str
    by: str
    why: str


@dataclass(frozen=True)
class RollBackRequest:
    to: str
    by: str
    why: str


async def read_request(clients: Clients, project: ProjectSettings) -> ApprovalRequest | RollBackRequest | None:
    """One look at MLflow's aliases. A missing alias, or one on what serves already, asks for nothing."""
    await _expire(clients, project)
    serving = await get_serving(clients, project.name)
    version = (await clients.registry.aliases(project.name)).get("production")
    current = await get_adapter(clients, serving.current)
    if version == current.version or await _promoting(clients, project.name):
        return None
    if version is None:
        await follow(clients, project)
        return None
    try:
        return await _as_request(clients, project, serving, version)
    except NightschoolError as error:
        await _put_back(clients, project, version, str(error))
        return None


async def _as_request(
    clients: Clients, project: ProjectSettings, serving: Serving, version: int
) -> ApprovalRequest | RollBackRequest:
    if not project.approval.allow_unattributed:
        raise NotPromotable("MLflow does not say who moved the alias, and this project wants a name")
    adapter = await _adapter_of(clients, project, version)
    why = "alias `production` moved in MLflow"
    night = await _night_of(clients, adapter)
    if adapter.name in (serving.previous, project.base_version):
        forwards = night is not None and night.state == NightState.ROLLED_BACK
        if not forwards:
            return RollBackRequest(adapter.name, UNATTRIBUTED, why)
    if night is None:
        raise NotPromotable(f"{adapter.name} comes from no night")
    await _promotable(clients, night)
    return ApprovalRequest(night.id, UNATTRIBUTED, why)


async def approve(clients: Clients, project: ProjectSettings, night_id: str, *, by: str, why: str) -> None:
    """Moves the night to `promoting`; a worker does the rest. Raises NotPromotable, WrongState."""
    async with clients.database.read() as session:
        night = await session.get(Night, night_id)
    if night is None:
        raise NotFound(f"no night {night_id!r}")
    await _promotable(clients, night)
    async with clients.database.write() as session:
        await approval.begin(session, night_id, by=by, why=why)
    log.info("approved", project=project.name, night=night_id, by=by, why=why)


async def _promotable(clients: Clients, night: Night) -> None:
    """Evidence of these very bytes, passed, and gathered against what serves now."""
    if night.state not in (NightState.AWAITING_APPROVAL, NightState.ROLLED_BACK):
        raise NotPromotable(f"night {night.id} is {night.state}: only one that awaits approval can be promoted")
    async with clients.database.read() as session:
        evidence = await session.get(Evidence, night.id)
        serving = await session.get(Serving, night.project)
        adapter = await session.get(Adapter, evidence.adapter) if evidence else None
    if evidence is None or adapter is None or not evidence.passed:
        raise NotPromotable(f"night {night.id} has no evidence that passed")
    if adapter.digest != evidence.adapter_digest:
        raise NotPromotable(f"{adapter.name} is not the adapter that was examined")
    if serving is None or serving.current != evidence.current:
        current = serving.current if serving else "nothing"
        raise NotPromotable(f"{adapter.name} was examined against {evidence.current}, but {current} serves now")


async def refuse(clients: Clients, project: ProjectSettings, night_id: str, *, by: str, why: str) -> None:
    async with clients.database.write() as session:
        await states.move(session, night_id, NightState.REFUSED, reason=f"refused by {by}: {why or 'no reason given'}")
        night = await session.get(Night, night_id)
    await _withdraw_candidate(clients, project, night)


async def roll_back(clients: Clients, project: ProjectSettings, *, by: str, why: str, to: str | None = None) -> None:
    """`previous` is loaded, so this takes one look at each replica and a switch. Also to the base, always."""
    serving = await get_serving(clients, project.name)
    target = to or serving.previous
    if target is None or target == serving.current:
        raise NoWayBack(f"project {project.name!r} has nothing to roll back to; {serving.current} serves")
    if target not in (serving.previous, project.base_version):
        raise NoWayBack(
            f"{target} is neither the previous adapter nor the base",
            hint=f"Roll back to {serving.previous} or {project.base_version}.",
        )
    adapter = await get_adapter(clients, target)
    await _loaded_everywhere(clients, project, adapter)
    leaving = await _night_of(clients, await get_adapter(clients, serving.current))
    await switch_to(clients, project, target, by=by, why=why or "roll back", night_id=leaving.id if leaving else None)
    if leaving is not None and leaving.state == NightState.PROMOTED:
        async with clients.database.write() as session:
            await states.move(session, leaving.id, NightState.ROLLED_BACK, reason=f"rolled back by {by}: {why}")
    await follow(clients, project)


async def _loaded_everywhere(clients: Clients, project: ProjectSettings, adapter: Adapter) -> None:
    name = project.served_name(adapter.name)
    for replica in clients.replicas:
        if name not in await replica.models():
            if adapter.folder is None:
                raise NoWayBack(f"{replica.url} does not serve the base {name!r}")
            await replica.load(name, Path(adapter.folder))


async def _expire(clients: Clients, project: ProjectSettings) -> None:
    """A candidate that waited too long, is not the newest, or was examined against what serves no more."""
    serving = await get_serving(clients, project.name)
    async with clients.database.read() as session:
        rows = await session.execute(
            select(Night)
            .where(Night.project == project.name, col(Night.state) == NightState.AWAITING_APPROVAL)
            .order_by(col(Night.created_at).desc())
        )
        waiting = list(rows.scalars())
        evidence = {night.id: await session.get(Evidence, night.id) for night in waiting}
    for index, night in enumerate(waiting):
        seen = evidence[night.id]
        reason = None
        if index > 0:
            reason = f"night {waiting[0].date} has a newer candidate"
        elif seen is not None and seen.current != serving.current:
            reason = f"examined against {seen.current}, but {serving.current} serves now"
        elif now() - night.created_at > timedelta(hours=project.approval.expires_hours):
            reason = f"nobody decided within {project.approval.expires_hours:g} hours"
        if reason is not None:
            async with clients.database.write() as session:
                await states.move(session, night.id, NightState.EXPIRED, reason=reason)
            await _withdraw_candidate(clients, project, night)


async def _withdraw_candidate(clients: Clients, project: ProjectSettings, night: Night | None) -> None:
    if night is None or night.candidate is None:
        return
    adapter = await get_adapter(clients, night.candidate)
    if (await clients.registry.aliases(project.name)).get("candidate") == adapter.version:
        await clients.registry.delete_alias(project.name, "candidate")


async def _put_back(clients: Clients, project: ProjectSettings, version: int, reason: str) -> None:
    log.warning("alias_put_back", project=project.name, version=version, reason=reason)
    await clients.registry.set_tags(project.name, version, {"nightschool.not_promoted": reason[:500]})
    await follow(clients, project)


async def _adapter_of(clients: Clients, project: ProjectSettings, version: int) -> Adapter:
    async with clients.database.read() as session:
        row = (
            await session.execute(select(Adapter).where(Adapter.project == project.name, Adapter.version == version))
        ).scalar_one_or_none()
    if row is None:
        raise NotPromotable(f"version {version} was not registered by Nightschool")
    return row


async def _night_of(clients: Clients, adapter: Adapter) -> Night | None:
    if adapter.night_id is None:
        return None
    async with clients.database.read() as session:
        return await session.get(Night, adapter.night_id)


async def _promoting(clients: Clients, project: str) -> bool:
    async with clients.database.read() as session:
        rows = await session.execute(
            select(Night.id).where(Night.project == project, col(Night.state) == NightState.PROMOTING).limit(1)
        )
        return rows.first() is not None
