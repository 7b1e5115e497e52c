"""What a project serves: the one row that decides, its moves, and the aliases elsewhere that follow it."""

from __future__ import annotations

import structlog
from sqlalchemy import update
from sqlalchemy.ext.asyncio import AsyncSession
from sqlmodel import col, select

from labeling.database import now
from labeling.errors import Conflict, NotFound, Refused, Unavailable
from loop import states
from loop.clients import Clients
from loop.model_card import with_switch
from loop.settings import ProjectSettings
from loop.tables import Adapter, Night, NightState, Promotion, Serving

log = structlog.get_logger()


class NothingServed(Conflict):
    code = "nothing_served"
    default_hint = "Start `nightschool up` or `work` once: it prepares each project."


class UnknownAdapter(NotFound):
    code = "unknown_adapter"
    default_hint = "`nightschool night show` names a night's adapter."


class ServedMeanwhile(Conflict):
    """Another promotion or roll back was first."""

    code = "served_meanwhile"
    default_hint = "Look again with `nightschool night show`, then decide anew."


async def get_serving(clients: Clients, project: str) -> Serving:
    async with clients.database.read() as session:
        row = await session.get(Serving, project)
    if row is None:
        raise NothingServed(f"project {project!r} serves nothing yet")
    return row


async def get_adapter(clients: Clients, name: str) -> Adapter:
    async with clients.database.read() as session:
        row = await session.get(Adapter, name)
    if row is None:
        raise UnknownAdapter(f"no adapter {name!r}")
    return row


async def latest_promotion(session: AsyncSession, project: str) -> Promotion | None:
    query = select(Promotion).where(Promotion.project == project).order_by(col(Promotion.at).desc()).limit(1)
    return (await session.execute(query)).scalar_one_or_none()


async def switch_to(
    clients: Clients,
    project: ProjectSettings,
    adapter: str,
    *,
    expected: str,
    by: str,
    why: str,
    night_id: str | None,
    rolls_back: bool = False,
    promotes: bool = False,
) -> Promotion:
    """Row, record, the night's state when rolled back: one transaction. Then the gateway.

    ServedMeanwhile unless `expected` serves and, when it `promotes`, its night is still promoting. A switch that was
    done already, and cut short, is found, not done again.
    """
    async with clients.database.write() as session:
        promotion = await latest_promotion(session, project.name)
        serving = await session.get(Serving, project.name, populate_existing=True)
        if serving is None:
            raise NothingServed(f"project {project.name!r} serves nothing yet")
        if not (serving.current == adapter and promotion is not None and promotion.to_adapter == adapter):
            night = await session.get(Night, night_id, populate_existing=True) if promotes and night_id else None
            if night is not None and night.state != NightState.PROMOTING:
                raise ServedMeanwhile(f"night {night.id} is {night.state} by now: nothing is switched for it")
            if serving.current != expected:
                raise ServedMeanwhile(f"{serving.current} serves project {project.name!r} now, no longer {expected}")
            promotion = Promotion(
                project=project.name, from_adapter=expected, to_adapter=adapter, by=by, why=why, night_id=night_id
            )
            serving.previous, serving.current, serving.updated_at = expected, adapter, now()
            session.add_all([serving, promotion])
            if rolls_back and night_id is not None:
                await states.move(session, night_id, NightState.ROLLED_BACK, reason=f"rolled back by {by}: {why}")
    await clients.aliases.set(project.name, project.served_name(adapter))
    log.info("switched", project=project.name, adapter=adapter, by=by, why=why)
    return promotion


async def follow(clients: Clients, project: ProjectSettings) -> None:
    """MLflow's aliases say what our table says: `production`, `previous`, and no `candidate` that serves.

    MLflow being down does not undo a switch: it stands as untold, and the poll comes here again before it reads.
    """
    serving = await get_serving(clients, project.name)
    async with clients.database.read() as session:
        promotion = await latest_promotion(session, project.name)
    try:
        await _set_aliases(clients, serving)
        if promotion is not None and not promotion.told:
            await _describe_switch(clients, promotion)
    except (Unavailable, Refused) as error:
        log.warning("aliases_do_not_follow", project=project.name, code=error.code, reason=str(error), hint=error.hint)
        return
    if promotion is not None and not promotion.told:
        async with clients.database.write() as session:
            await session.execute(update(Promotion).where(col(Promotion.id) == promotion.id).values(told=True))


async def _describe_switch(clients: Clients, promotion: Promotion) -> None:
    """Who approved stands on the version's page."""
    version = (await get_adapter(clients, promotion.to_adapter)).version
    info = await clients.registry.version_info(promotion.project, version)
    if info is None:  # deleted there: nothing to describe
        return
    described = with_switch(info.description, promotion)
    if described != info.description:
        await clients.registry.set_description(promotion.project, version, described)
    if promotion.forwards:
        tags = {"nightschool.approved_by": promotion.by, "nightschool.approved_at": promotion.at.isoformat()}
        await clients.registry.set_tags(promotion.project, version, tags)


async def _set_aliases(clients: Clients, serving: Serving) -> None:
    registry, project = clients.registry, serving.project
    there = await registry.aliases(project)
    wanted = {"production": serving.current, "previous": serving.previous}
    versions = {alias: (await get_adapter(clients, name)).version for alias, name in wanted.items() if name}
    for alias, version in versions.items():
        if there.get(alias) != version:
            await registry.set_alias(project, alias, version)
    if there.get("candidate") == versions["production"]:
        await registry.delete_alias(project, "candidate")
