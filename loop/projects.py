"""What a project needs before its first night: version 1 in the registry, the base as an adapter row, a serving row."""

from __future__ import annotations

import asyncio

from labeling.database import insert_or_nothing
from labeling.errors import Conflict
from loop.adapter_files import base_digest
from loop.clients import Clients
from loop.settings import ProjectSettings
from loop.tables import Adapter, Serving


class BaseChanged(Conflict):
    """Version 1 *is* the base: another base makes every earlier adapter and its evidence meaningless."""

    code = "base_changed"


async def prepare(clients: Clients, project: ProjectSettings) -> None:
    """Idempotent; run at each start."""
    digest = await asyncio.to_thread(base_digest, project.base_dir)
    base = Adapter(name=project.base_version, project=project.name, version=1, digest=digest, base_digest=digest)
    async with clients.database.write() as session:
        await session.execute(insert_or_nothing(session, base))
        await session.execute(insert_or_nothing(session, Serving(project=project.name, current=base.name)))
    await require_same_base(clients, project, digest)
    await clients.registry.ensure_model(project.name, base_digest=digest, base_name=project.base_name)


async def require_same_base(clients: Clients, project: ProjectSettings, digest: str) -> None:
    """BaseChanged unless the base folder is the one that the project was set up with."""
    async with clients.database.read() as session:
        kept = await session.get(Adapter, project.base_version)
    if kept is not None and kept.digest != digest:
        raise BaseChanged(
            f"project {project.name!r} was set up with base {kept.digest[:19]}…; {project.base_dir} is {digest[:19]}…",
            hint="Put the old folder back, or start a new project (another name) for the new base.",
        )
