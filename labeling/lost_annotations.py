"""Annotations that Label Studio has lost while their opinion still counts: kept under numbers that it never gives.

Its project was restored from a backup and the number went to another annotation, or the task was deleted before its
label was settled.
"""

from __future__ import annotations

from sqlalchemy import func
from sqlalchemy.ext.asyncio import AsyncSession
from sqlmodel import col, select

from labeling.tables import Annotation


async def keep_lost(session: AsyncSession, row: Annotation) -> None:
    """Under the next negative number of its Label Studio project."""
    lowest = select(func.min(Annotation.annotation_id)).where(
        col(Annotation.labelling_project) == row.labelling_project
    )
    number = min((await session.execute(lowest)).scalar_one() or 0, 0) - 1
    session.add(Annotation(**{**row.model_dump(), "annotation_id": number}))
    await session.delete(row)
    await session.flush()
