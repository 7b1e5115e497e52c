"""A review item as the task that is sent to Label Studio, with what users said of it."""

from __future__ import annotations

from collections.abc import Sequence

from sqlalchemy import func
from sqlmodel import col, select

from labeling.database import Database
from labeling.label_studio import NewTask
from labeling.labeling_screen import task_data
from labeling.tables import Feedback, ItemMember, ReviewItem

COMMENTS_SHOWN = 3


async def as_tasks(database: Database, items: Sequence[ReviewItem]) -> dict[str, NewTask]:
    """By item id."""
    ids = [item.id for item in items]
    comments, users = await shown_comments(database, ids), await _reporters(database, ids)
    return {item.id: as_task(item, comments.get(item.id, ()), users.get(item.id, 0)) for item in items}


def as_task(item: ReviewItem, comments: Sequence[str], users: int = 0) -> NewTask:
    """The server hands out the lowest score first."""
    return NewTask(item.id, task_data(item, comments, users), queue_score(item.score))


def queue_score(score: float) -> float:
    return round(1 - score, 6)


async def shown_comments(database: Database, items: Sequence[str]) -> dict[str, list[str]]:
    """What users said, the newest first, `COMMENTS_SHOWN` an item."""
    said = (
        select(col(ItemMember.item_id), col(ItemMember.comment))
        .join(Feedback, col(Feedback.id) == col(ItemMember.feedback_id))
        .where(col(ItemMember.item_id).in_(items), col(ItemMember.comment).is_not(None))
        .order_by(col(Feedback.created_at).desc(), col(Feedback.id))
    )
    found: dict[str, list[str]] = {}
    async with database.read() as session:
        for item_id, comment in await session.execute(said):
            heard = found.setdefault(item_id, [])
            if comment not in heard and len(heard) < COMMENTS_SHOWN:
                heard.append(str(comment))
    return found


async def _reporters(database: Database, items: Sequence[str]) -> dict[str, int]:
    """How many different ones each item has."""
    counted = (
        select(col(ItemMember.item_id), func.count(func.distinct(col(Feedback.reporter))))
        .join(Feedback, col(Feedback.id) == col(ItemMember.feedback_id))
        .where(col(ItemMember.item_id).in_(items))
        .group_by(col(ItemMember.item_id))
    )
    async with database.read() as session:
        return {str(item_id): int(count) for item_id, count in (await session.execute(counted)).all()}
