"""The place where the loop writes how unsure a model was of a flagged answer; measuring it is none of our business.

What can't be measured, because its adapter serves no more or its answer has no text, stays unknown and is not asked
for again.
"""

from __future__ import annotations

from sqlalchemy import update
from sqlmodel import col, select

from labeling.database import Database
from labeling.selection import place
from labeling.settings import SelectionSettings
from labeling.tables import ItemState, ReviewItem

TRIES = 3
DONE = 100  # `uncertainty_tries` of what is measured, or never will be
LOOKED_AT = 200
WAITING = (ItemState.OPEN, ItemState.PUSHED)


async def next_unmeasured(database: Database, project: str, limit: int) -> list[ReviewItem]:
    """Of the newest that were not measured yet, those that stand first. The cost does not grow with the queue."""
    newest = (
        select(ReviewItem)
        .where(
            col(ReviewItem.project) == project,
            col(ReviewItem.gold_id).is_(None),
            col(ReviewItem.uncertainty_tries) < TRIES,
        )
        .order_by(col(ReviewItem.uncertainty_tries), col(ReviewItem.id).desc())
        .limit(LOOKED_AT)
    )
    async with database.read() as session:
        found = list((await session.execute(newest)).scalars())
    late = [item.id for item in found if item.state not in WAITING]
    if late:
        async with database.write() as session:
            labelled = col(ReviewItem.id).in_(late) & col(ReviewItem.state).not_in(WAITING)
            await session.execute(update(ReviewItem).where(labelled).values(uncertainty_tries=DONE))
    waiting = [item for item in found if item.state in WAITING]
    return sorted(waiting, key=lambda item: (-item.score, item.id))[:limit]


async def record(
    database: Database, measured: ReviewItem, uncertainty: float | None, settings: SelectionSettings, *, final: bool
) -> None:
    """0..1, of `measured.answer`; dropped if another answer stands there by now. None: it failed, `final` for good."""
    async with database.write() as session:
        item = await session.get(ReviewItem, measured.id, with_for_update=True)
        if item is None or item.answer != measured.answer:
            return
        item.uncertainty_tries = DONE if final else item.uncertainty_tries + 1
        if uncertainty is not None and item.state in WAITING:
            item.uncertainty = round(min(max(uncertainty, 0.0), 1.0), 4)
            place(item, settings)
