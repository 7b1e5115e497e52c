"""Scores of the queue brought up to date: new items get their novelty, and the head of the queue is looked at again
whenever something was labelled since.

Only the head, because a label can only lower the novelty of others: an item further back can't have risen above it
(the lazy evaluation of Minoux, 1978). So the cost of a call does not grow with the queue.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime

from sqlalchemy.ext.asyncio import AsyncSession
from sqlmodel import col, select

from labeling.database import Database, now, one_at_a_time
from labeling.embeddings import embedder
from labeling.labelled_index import asked_text, labelled_prompts
from labeling.selection import place
from labeling.settings import LabelingSettings, SelectionSettings
from labeling.tables import Chosen, ItemState, ReviewItem

NEW_AT_ONCE = 500
HEAD = 200
ROWS_PER_TRANSACTION = 100
COMPARED_WITH = 200  # recent items, among whose scores the lots of the random slice are drawn
WAITING = (ItemState.OPEN, ItemState.PUSHED, ItemState.DISPUTED)


def queue_of(project: str) -> str:
    """What transactions that change many of its items lock: two folds would count the same feedback twice, and a fold
    and a rescoring would lock rows in each other's order.
    """
    return f"fold:{project}"


async def rescore(database: Database, project: str, settings: LabelingSettings) -> int:
    """How many items were looked at. Called after each folding; done again with nothing new, it does nothing."""
    prompts = labelled_prompts(database, project, embedder(settings.embedding_model_dir))
    await prompts.refresh(database)
    async with database.read() as session:
        due = await _due(session, project, prompts.changed_at)
        others = await _others(session, project) if due else []
    texts = [asked_text(item.messages) for item in due]
    novelty = dict(zip((item.id for item in due), await prompts.novelty(texts), strict=True))
    for start in range(0, len(due), ROWS_PER_TRANSACTION):
        some = [item.id for item in due[start : start + ROWS_PER_TRANSACTION]]
        async with database.write() as session:
            await one_at_a_time(session, queue_of(project))
            await _score(session, {item_id: novelty[item_id] for item_id in some}, settings.selection, others)
    return len(due)


async def _due(session: AsyncSession, project: str, changed_at: datetime | None) -> list[ReviewItem]:
    ours = (col(ReviewItem.project) == project) & col(ReviewItem.gold_id).is_(None)
    new = select(ReviewItem).where(ours, col(ReviewItem.scored_at).is_(None)).limit(NEW_AT_ONCE)
    due = list((await session.execute(new)).scalars())
    if changed_at is None:
        return due
    stale: list[str] = []
    for state in (ItemState.PUSHED, ItemState.OPEN):
        head = (
            select(ReviewItem.id, ReviewItem.scored_at)
            .where(ours, col(ReviewItem.state) == state)
            .order_by(col(ReviewItem.score).desc(), col(ReviewItem.created_at), col(ReviewItem.id))
            .limit(HEAD)
        )
        stale += [item_id for item_id, at in await session.execute(head) if at is not None and at < changed_at]
    older = await session.execute(select(ReviewItem).where(col(ReviewItem.id).in_(stale)))
    return [*due, *older.scalars()]


async def _others(session: AsyncSession, project: str) -> list[float]:
    recent = (
        select(ReviewItem.score, ReviewItem.chosen)
        .where(col(ReviewItem.project) == project, col(ReviewItem.gold_id).is_(None))
        .order_by(col(ReviewItem.id).desc())
        .limit(COMPARED_WITH)
    )
    return sorted(score for score, chosen in await session.execute(recent) if chosen is Chosen.SCORE)


async def _score(
    session: AsyncSession, novelty: dict[str, float], settings: SelectionSettings, others: Sequence[float]
) -> None:
    """On the rows as they are now: folding may have counted meanwhile."""
    moment = now()
    for item_id in sorted(novelty):
        item = await session.get(ReviewItem, item_id, with_for_update=True)
        if item is None:
            continue
        if item.state in WAITING:
            # Flagged again although its prompt is labelled: how near that label is says nothing then.
            item.novelty = None if item.round > 1 else novelty[item_id]
            place(item, settings, others)
        item.scored_at = moment
