"""Approval, refusal, roll back: by a person here, or by an alias moved in MLflow, which is a request and no more.

An alias is honoured only with evidence of that very adapter, gathered against what serves now; otherwise it is put back
and the version is tagged with the reason.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import structlog
from sqlalchemy.ext.asyncio import AsyncSession
from sqlmodel import col, select

from labeling.errors import Conflict, NotFound, Refused, Unavailable
from loop import approval, states
from loop.clients import Clients
from loop.evidence_check import NoSuchNight, NotPromotable, require_promotable, why_stale, why_too_old
from loop.mlflow_registry import ADAPTER_DIGEST
from loop.reconcile import ensure_loaded
from loop.serving import follow, get_adapter, get_serving, latest_promotion, switch_to
from loop.settings import ProjectSettings
from loop.tables import Adapter, Evidence, Night, NightState, Promotion

log = structlog.get_logger()
UNATTRIBUTED = "mlflow (unattributed)"
REASON_TAG = "nightschool.not_promoted"


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


@dataclass(frozen=True)
class _Standing:
    """What our tables said at one moment; while a switch is not over, MLflow's aliases ask for nothing."""

    current: str
    promotion: str | None
    settled: bool


async def read_request(clients: Clients, project: ProjectSettings) -> ApprovalRequest | RollBackRequest | None:
    """One look at MLflow's aliases. A missing alias, or one on what serves already, asks for nothing."""
    await _expire(clients, project)
    before = await _standing(clients, project)
    if before.settled:
        aliases = await clients.registry.aliases(project.name)
        await _withdraw_candidate(clients, project, aliases)
        version = aliases.get("production")
        # Read again: an alias read before a switch, compared with what serves after it, would look like a roll back.
        if await _standing(clients, project) != before:
            return None
        if version == (await get_adapter(clients, before.current)).version:
            return None
        if version is not None:
            return await _judge(clients, project, before.current, version)
    if not await _promoting(clients, project.name):
        await follow(clients, project)
    return None


async def approve(clients: Clients, project: ProjectSettings, night_id: str, *, by: str, why: str) -> None:
    """Moves the night to `promoting`; a worker does the rest. Raises NotPromotable, NoSuchNight."""
    async with clients.database.write() as session:
        await require_promotable(session, night_id)
        await approval.begin(session, night_id, by=by, why=why)
    log.info("approved", project=project.name, night=night_id, by=by, why=why)


async def refuse(clients: Clients, project: ProjectSettings, night_id: str, *, by: str, why: str) -> None:
    async with clients.database.write() as session:
        night = await session.get(Night, night_id)
        if night is None:
            raise NoSuchNight(f"no night {night_id!r}")
        await states.move(session, night_id, NightState.REFUSED, reason=f"refused by {by}: {why or 'no reason given'}")
    log.info("refused", project=project.name, night=night_id, by=by, why=why)
    try:
        await _withdraw_candidate(clients, project, await clients.registry.aliases(project.name))
    except Unavailable as error:  # refused all the same: the poll takes the alias away once MLflow is back
        log.warning("candidate_not_withdrawn", project=project.name, code=error.code, reason=str(error))


async def roll_back(clients: Clients, project: ProjectSettings, *, by: str, why: str, to: str | None = None) -> None:
    """`previous` is loaded, so this takes one look at each replica and a switch. Also to the base, always."""
    serving = await get_serving(clients, project.name)
    current = await get_adapter(clients, serving.current)
    target = await _way_back(clients, project, current, to or serving.previous)
    await _load_where_possible(clients, project, target)
    night = await _night_of(clients, current)
    await switch_to(
        clients,
        project,
        target.name,
        expected=current.name,
        by=by,
        why=why or "roll back",
        night_id=night.id if night else None,
        rolls_back=night is not None and night.state in {NightState.PROMOTED, NightState.PROMOTING},
    )
    await follow(clients, project)


async def _load_where_possible(clients: Clients, project: ProjectSettings, target: Adapter) -> None:
    """A replica that is down must not stop a roll back: it gets the adapter when it is back, from `reconcile`."""
    down: list[Unavailable] = []
    for replica in clients.replicas:
        try:
            await ensure_loaded(replica, project, target)
        except Unavailable as error:
            log.warning("replica_skipped", replica=replica.url, code=error.code, reason=str(error))
            down.append(error)
    if down and len(down) == len(clients.replicas):
        raise down[0]


async def _way_back(clients: Clients, project: ProjectSettings, current: Adapter, name: str | None) -> Adapter:
    """The adapter to go back to: the base, or one that was promoted and is older than what serves."""
    if name is None:
        raise NoWayBack(f"project {project.name!r} has nothing to roll back to; {current.name} serves")
    target = await get_adapter(clients, name)
    night = await _night_of(clients, target)
    async with clients.database.read() as session:
        served = await session.execute(select(Promotion.id).where(Promotion.to_adapter == target.name).limit(1))
    rolled_back = night is not None and night.state == NightState.ROLLED_BACK
    proved = target.name == project.base_version or (served.first() is not None and not rolled_back)
    if target.project != project.name or target.version >= current.version or not proved:
        raise NoWayBack(
            f"{name} is no way back from {current.name}",
            hint=f"Forwards is `approve`. Name an older, promoted adapter or the base: --to {project.base_version}.",
        )
    return target


async def _judge(
    clients: Clients, project: ProjectSettings, current: str, version: int
) -> ApprovalRequest | RollBackRequest | None:
    """Only what is certainly wrong is put back: an outside system that is down says nothing about the request."""
    try:
        return await _as_request(clients, project, current, version)
    except (Refused, Conflict, NotFound) as error:
        log.warning("alias_put_back", project=project.name, version=version, reason=str(error))
        await follow(clients, project)
        if await clients.registry.version_info(project.name, version) is not None:
            await clients.registry.set_tags(project.name, version, {REASON_TAG: str(error)[:500]})
        return None


async def _as_request(
    clients: Clients, project: ProjectSettings, current: str, version: int
) -> ApprovalRequest | RollBackRequest:
    if not project.approval.allow_unattributed:
        raise NotPromotable("MLflow does not say who moved the alias, and this project wants a name")
    adapter = await _adapter_of(clients, project, version)
    why = f"alias `production` moved to version {version} in MLflow"
    night = await _night_of(clients, adapter)
    if night is None or night.state == NightState.PROMOTED:
        await _way_back(clients, project, await get_adapter(clients, current), adapter.name)
        return RollBackRequest(adapter.name, UNATTRIBUTED, why)
    async with clients.database.read() as session:
        await require_promotable(session, night.id)
    return ApprovalRequest(night.id, UNATTRIBUTED, why)


async def _adapter_of(clients: Clients, project: ProjectSettings, version: int) -> Adapter:
    """Ours by number and, the base aside, by the digest that its tag carries."""
    async with clients.database.read() as session:
        query = select(Adapter).where(Adapter.project == project.name, Adapter.version == version)
        row = (await session.execute(query)).scalar_one_or_none()
    info = await clients.registry.version_info(project.name, version)
    if row is None or info is None:
        raise NotPromotable(f"version {version} was not registered by Nightschool, or is gone")
    if row.folder is not None and info.tags.get(ADAPTER_DIGEST) != row.digest:
        raise NotPromotable(f"version {version} carries another digest in MLflow than {row.name} has here")
    return row


async def _expire(clients: Clients, project: ProjectSettings) -> None:
    """A candidate that waited too long, is not the newest, or was examined against what serves no more."""
    async with clients.database.read() as session:
        rows = await session.execute(
            select(Night)
            .where(Night.project == project.name, col(Night.state) == NightState.AWAITING_APPROVAL)
            .order_by(col(Night.created_at).desc())
        )
        waiting = list(rows.scalars())
        newest = waiting[0] if waiting else None
        reasons = {night.id: await _why_expired(session, project, night, newest) for night in waiting}
    for night in waiting:
        if reason := reasons[night.id]:
            async with clients.database.write() as session:
                await states.move(session, night.id, NightState.EXPIRED, reason=reason)
            log.info("expired", project=project.name, night=night.id, reason=reason)


async def _why_expired(
    session: AsyncSession, project: ProjectSettings, night: Night, newest: Night | None
) -> str | None:
    if newest is not None and night is not newest:
        return f"the night of {newest.date} has a newer candidate"
    evidence = await session.get(Evidence, night.id)
    if evidence is None:
        return None
    return await why_stale(session, night, evidence) or why_too_old(evidence, project.approval)


async def _withdraw_candidate(clients: Clients, project: ProjectSettings, aliases: Mapping[str, int]) -> None:
    """The alias `candidate` goes when the night of its version was refused or has expired."""
    if (version := aliases.get("candidate")) is None:
        return
    async with clients.database.read() as session:
        query = (
            select(Night.id)
            .join(Adapter, col(Adapter.name) == col(Night.candidate))
            .where(
                col(Adapter.project) == project.name,
                col(Adapter.version) == version,
                col(Night.state).in_((NightState.REFUSED, NightState.EXPIRED)),
            )
        )
        over = (await session.execute(query)).first()
    if over is not None:
        await clients.registry.delete_alias(project.name, "candidate")


async def _standing(clients: Clients, project: ProjectSettings) -> _Standing:
    serving = await get_serving(clients, project.name)
    async with clients.database.read() as session:
        promotion = await latest_promotion(session, project.name)
    told = promotion is None or promotion.told
    promoting = await _promoting(clients, project.name)
    return _Standing(serving.current, promotion.id if promotion else None, told and not promoting)


async def _promoting(clients: Clients, project: str) -> bool:
    async with clients.database.read() as session:
        query = select(Night.id).where(Night.project == project, col(Night.state) == NightState.PROMOTING).limit(1)
        return (await session.execute(query)).first() is not None


async def _night_of(clients: Clients, adapter: Adapter) -> Night | None:
    if adapter.night_id is None:
        return None
    async with clients.database.read() as session:
        return await session.get(Night, adapter.night_id)
