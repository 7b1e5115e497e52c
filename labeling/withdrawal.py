"""Items taken out of the review queue by a person, for good: who, when and why is kept.

The task leaves Label Studio with the next push. What people have said of it already makes no label any more.
"""

from __future__ import annotations

from typing import Any

from sqlalchemy import update
from sqlalchemy.ext.asyncio import AsyncSession
from sqlmodel import col

from labeling.database import Database, now
from labeling.errors import Conflict, NotFound
from labeling.tables import ItemState, ItemWithdrawal, Label, LabelState, ReviewItem

REASON_AT_MOST = 500
UNSETTLED = (LabelState.DISPUTED, LabelState.REFUSED)


class UnknownItem(NotFound):
    code = "unknown_item"
    default_hint = "`nightschool queue next` shows the ids of what waits."


class ItemIsGold(Conflict):
    code = "item_is_gold"


class ItemIsLabelled(Conflict):
    code = "item_is_labelled"
    default_hint = "Delete its annotations in Label Studio, which takes the label back; then withdraw the item."


async def withdraw(database: Database, project: str, item_id: str, by: str, reason: str = "") -> dict[str, Any]:
    """{"id", "state", "by", "at", "reason"}: of the first time, however often it is asked for."""
    async with database.write() as session:
        item = await session.get(ReviewItem, item_id, with_for_update=True)
        if item is None or item.project != project:
            raise UnknownItem(f"project {project!r} has no review item {item_id!r}")
        row = await session.get(ItemWithdrawal, item_id)
        if row is None:
            await _may_be_withdrawn(session, item)
            row = ItemWithdrawal(item_id=item_id, project=project, by=by, reason=reason[:REASON_AT_MOST])
            session.add(row)
            await _withdraw(session, item)
        return {"id": item_id, "state": item.state, "by": row.by, "at": row.at, "reason": row.reason}


async def _may_be_withdrawn(session: AsyncSession, item: ReviewItem) -> None:
    if item.gold_id is not None:
        cure = f"`nightschool gold retire {item.gold_id}` asks it no more."
        raise ItemIsGold(f"{item.id} is a gold question", hint=cure)
    label = await session.get(Label, item.id)
    if label is not None and label.state is LabelState.ACCEPTED:
        raise ItemIsLabelled(f"{item.id} is labelled already, by {', '.join(label.annotators)}")


async def _withdraw(session: AsyncSession, item: ReviewItem) -> None:
    item.state = ItemState.WITHDRAWN
    mine = (col(Label.item_id) == item.id) & col(Label.state).in_(UNSETTLED)
    values = {"state": LabelState.WITHDRAWN, "reason": "its item was withdrawn", "updated_at": now()}
    await session.execute(update(Label).where(mine).values(**values))
