"""Which Label Studio project holds a project's tasks: found by its marker, made when missing."""

from __future__ import annotations

from sqlalchemy import update
from sqlalchemy.ext.asyncio import AsyncSession
from sqlmodel import col

from labeling.database import Database, insert_or_nothing
from labeling.label_studio import LabelStudioServer
from labeling.labeling_screen import SCREEN
from labeling.screen_upkeep import is_settled, keep_screen
from labeling.settings import LabelingSettings
from labeling.tables import ItemState, LabellingProject, ReviewItem


async def labelling_project(
    database: Database, server: LabelStudioServer, project: str, settings: LabelingSettings, *, sure: bool = False
) -> LabellingProject:
    """`sure` looks for the marker again, as before anything is sent: the project may have been deleted or replaced.

    Otherwise once a process, and again once Label Studio says that it does not know the project.
    """
    server_project = None if sure else server.remembered_project(project)
    if server_project is None:
        server_project = await server.ensure_project(project, project, SCREEN, settings.annotations_per_item)
    async with database.read() as session:
        known = await session.get(LabellingProject, project)
    if known is None or known.server_project != server_project:
        async with database.write() as session:
            known = await _follow(session, project, server_project)
    if not is_settled(known):
        await keep_screen(database, server, known)
    return known


async def _follow(session: AsyncSession, project: str, server_project: int) -> LabellingProject:
    """A new or another server project: read it from its start, and send again what nobody has labelled yet."""
    await session.execute(insert_or_nothing(session, LabellingProject(project=project, server_project=server_project)))
    row = await session.get(LabellingProject, project, with_for_update=True)
    assert row is not None
    row.server_project, row.watermark, row.swept_at, row.screen = server_project, None, None, None
    await session.execute(
        update(ReviewItem)
        .where(col(ReviewItem.project) == project, col(ReviewItem.state) == ItemState.PUSHED)
        .values(state=ItemState.OPEN, task_id=None, pushed_at=None)
    )
    return row
