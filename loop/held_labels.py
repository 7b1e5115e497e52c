"""Labels of a REJECTED night stay out of training until a person confirms them: one bad night blocks no other."""

from __future__ import annotations

from collections.abc import Iterable
from typing import cast

from sqlalchemy import update
from sqlalchemy.engine import CursorResult
from sqlalchemy.ext.asyncio import AsyncSession
from sqlmodel import col, select

from labeling.database import Database
from labeling.errors import NotFound
from labeling.tables import Label
from loop.tables import LabelUse


class NotHeld(NotFound):
    code = "label_not_held"
    default_hint = "`nightschool labels held` lists those that are."


async def hold(session: AsyncSession, night_id: str) -> None:
    """In the transaction that rejects the night. Older labels, replayed, have proved themselves and stay free."""
    await session.execute(
        update(LabelUse).where(col(LabelUse.night_id) == night_id, col(LabelUse.role) == "new").values(held=True)
    )


async def confirm(database: Database, project: str, label_ids: Iterable[str]) -> int:
    """All of them or none; gives how many."""
    wanted = set(label_ids)
    if not wanted:
        return 0
    async with database.write() as session:
        ours = select(Label.id).where(col(Label.project) == project, col(Label.id).in_(wanted))
        held = col(LabelUse.held).is_(True)
        found = set(
            (await session.execute(select(LabelUse.label_id).where(col(LabelUse.label_id).in_(ours), held))).scalars()
        )
        if missing := sorted(wanted - found):
            raise NotHeld(f"not held in project {project!r}: {', '.join(missing[:10])}")
        result = await session.execute(
            update(LabelUse).where(col(LabelUse.label_id).in_(found), held).values(held=False)
        )
    assert cast("CursorResult[object]", result).rowcount
    return len(found)
