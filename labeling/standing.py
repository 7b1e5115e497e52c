"""Who is doubted by the gold questions; when that changes, all that this person alone said is settled anew."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection

from sqlalchemy import delete
from sqlalchemy.ext.asyncio import AsyncSession
from sqlmodel import col, select

from labeling.crew import read_crew
from labeling.database import Database, insert_or_nothing
from labeling.gold_answers import doubt, gold_accuracy
from labeling.settings import GoldSettings, LabelingSettings
from labeling.settling import settle
from labeling.tables import Annotation, DoubtedAnnotator, ReviewItem

ITEMS_PER_TRANSACTION = 50


async def follow_standing(
    database: Database, project: str, settings: LabelingSettings, annotators: Collection[str] | None = None
) -> Counter[str]:
    """Labels that came into a state thereby. `annotators`: whose answers changed; None looks at everybody's.

    Only the latter sees what else decides: edited gold questions and settings, a pull that was killed before it came
    here.
    """
    async with database.write() as session:
        changed = await renew_doubts(session, project, settings.gold, annotators)
        items = await _items_of(session, project, changed)
    labels: Counter[str] = Counter()
    for start in range(0, len(items), ITEMS_PER_TRANSACTION):
        async with database.write() as session:
            crew = await read_crew(session, project, settings.annotators)
            for item_id in items[start : start + ITEMS_PER_TRANSACTION]:
                item = await session.get(ReviewItem, item_id, with_for_update=True)
                label = await settle(session, item, settings, crew) if item else None
                if label is not None:
                    labels[label.state] += 1
    return labels


async def _items_of(session: AsyncSession, project: str, annotators: set[str]) -> list[str]:
    """By key, so that two at once can't lock each other out on PostgreSQL."""
    if not annotators:
        return []
    rows = await session.execute(
        select(ReviewItem.id)
        .distinct()
        .join(Annotation, col(Annotation.item_id) == col(ReviewItem.id))
        .where(
            col(ReviewItem.project) == project,
            col(ReviewItem.gold_id).is_(None),
            col(Annotation.annotator).in_(sorted(annotators)),
            col(Annotation.deleted).is_(False),
        )
        .order_by(col(ReviewItem.id))
    )
    return list(rows.scalars())


async def renew_doubts(
    session: AsyncSession, project: str, settings: GoldSettings, annotators: Collection[str] | None
) -> set[str]:
    """Writes who of these is doubted now; the people whose standing changed."""
    accuracy = await gold_accuracy(session, project, annotators)
    now_doubted = {name: why for name, one in accuracy.items() if (why := doubt(one, settings)) is not None}
    doubted = select(DoubtedAnnotator).where(col(DoubtedAnnotator.project) == project)
    if annotators is not None:
        doubted = doubted.where(col(DoubtedAnnotator.annotator).in_(sorted(annotators)))
    before = {row.annotator: row for row in (await session.execute(doubted)).scalars()}
    cleared = before.keys() - now_doubted.keys()
    if cleared:
        gone = (col(DoubtedAnnotator.project) == project) & col(DoubtedAnnotator.annotator).in_(sorted(cleared))
        await session.execute(delete(DoubtedAnnotator).where(gone))
    for name, why in sorted(now_doubted.items()):
        if name in before:
            before[name].why = why
        else:
            row = DoubtedAnnotator(project=project, annotator=name, why=why)
            await session.execute(insert_or_nothing(session, row))
    return cleared | (now_doubted.keys() - before.keys())
