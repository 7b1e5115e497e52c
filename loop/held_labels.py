"""What a REJECTED night trained on stays out of training until a person confirms it: one bad night blocks no other."""

from __future__ import annotations

from collections.abc import Iterable
from typing import cast

from sqlalchemy import update
from sqlalchemy.engine import CursorResult
from sqlalchemy.ext.asyncio import AsyncSession
from sqlmodel import col, select

from labeling.database import Database
from labeling.errors import NotFound
from loop.preference_examples import ROLE as THUMB
from loop.tables import LabelUse, Night


class NotHeld(NotFound):
    code = "label_not_held"
    default_hint = "`nightschool labels held` lists those that are."


async def hold(session: AsyncSession, night_id: str) -> None:
    """In the transaction that rejects the night. Older labels, replayed, have proved themselves and stay free."""
    await session.execute(
        update(LabelUse)
        .where(col(LabelUse.night_id) == night_id, col(LabelUse.role).in_(("new", THUMB)))
        .values(held=True)
    )


async def confirm(database: Database, project: str, label_ids: Iterable[str]) -> int:
    """All of them or none; gives how many."""
    wanted = set(label_ids)
    if not wanted:
        return 0
    async with database.write() as session:
        nights = select(Night.id).where(col(Night.project) == project)
        held = col(LabelUse.held).is_(True) & col(LabelUse.night_id).in_(nights)
        ours = select(LabelUse.label_id).where(col(LabelUse.label_id).in_(wanted), held)
        found = set((await session.execute(ours)).scalars())
        if missing := sorted(wanted - found):
            raise NotHeld(f"not held in project {project!r}: {', '.join(missing[:10])}")
        result = await session.execute(
            update(LabelUse).where(col(LabelUse.label_id).in_(found), held).values(held=False)
        )
    assert cast("CursorResult[object]", result).rowcount
    return len(found)
