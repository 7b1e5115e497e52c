"""What a project serves: the one row that decides, its moves, and the aliases elsewhere that follow it."""

from __future__ import annotations

import structlog
from sqlmodel import col, select

from labeling.database import now
from labeling.errors import Conflict, NotFound, Refused, Unavailable
from loop.clients import Clients
from loop.settings import ProjectSettings
from loop.tables import Adapter, Promotion, Serving

log = structlog.get_logger()


class NothingServed(Conflict):
    code = "nothing_served"
    default_hint = "Start `nightschool up` or `work` once: it prepares each project."


class UnknownAdapter(NotFound):
    code = "unknown_adapter"


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
        raise UnknownAdapter(f"no adapter {name!r}", hint="`nightschool night show` names a night's adapter.")
    return row


async def switch_to(
    clients: Clients, project: ProjectSettings, adapter: str, *, by: str, why: str, night_id: str | None
) -> Promotion:
    """Row, record and gateway. Done already (a resumed switch) is found again, not done twice."""
    async with clients.database.write() as session:
        serving = await session.get(Serving, project.name)
        if serving is None:
            raise NothingServed(f"project {project.name!r} serves nothing yet")
        if serving.current == adapter:
            promotion = await _latest(session, project.name, adapter)
        else:
            promotion = Promotion(
                project=project.name,
                from_adapter=serving.current,
                to_adapter=adapter,
                by=by,
                why=why,
                night_id=night_id,
            )
            serving.previous, serving.current, serving.updated_at = serving.current, adapter, now()
            session.add_all([serving, promotion])
    await clients.aliases.set(project.name, project.served_name(adapter))
    log.info("switched", project=project.name, adapter=adapter, by=by, why=why)
    return promotion


async def _latest(session: object, project: str, adapter: str) -> Promotion:
    query = (
        select(Promotion)
        .where(Promotion.project == project, Promotion.to_adapter == adapter)
        .order_by(col(Promotion.at).desc())
        .limit(1)
    )
    found = (await session.execute(query)).scalar_one_or_none()  # type: ignore[attr-defined]
    if found is None:
        raise Conflict(f"{adapter} serves project {project!r} already", hint="There is nothing to promote.")
    return found  # type: ignore[no-any-return]


async def follow(clients: Clients, project: ProjectSettings) -> None:
    """MLflow's aliases say what our table says: `production`, `previous`, and no `candidate` that is either.

    MLflow being down does not undo a switch; the poll comes here again.
    """
    serving = await get_serving(clients, project.name)
    current = await get_adapter(clients, serving.current)
    try:
        aliases = await clients.registry.aliases(project.name)
        if aliases.get("production") != current.version:
            await clients.registry.set_alias(project.name, "production", current.version)
        if serving.previous is not None:
            previous = await get_adapter(clients, serving.previous)
            if aliases.get("previous") != previous.version:
                await clients.registry.set_alias(project.name, "previous", previous.version)
        if aliases.get("candidate") == current.version:
            await clients.registry.delete_alias(project.name, "candidate")
    except (Unavailable, Refused) as error:
        log.warning("aliases_do_not_follow", project=project.name, code=error.code, reason=str(error))
