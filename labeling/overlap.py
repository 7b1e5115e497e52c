"""How many people must label an item: everybody's number, or more for a share drawn by hash and for risky items."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from sqlalchemy.ext.asyncio import AsyncSession
from sqlmodel import col, select

from labeling.draws import in_share
from labeling.settings import LabelingSettings, RiskySettings
from labeling.tables import Feedback, FeedbackKind, ItemMember, ReviewItem


async def people_needed(session: AsyncSession, item: ReviewItem, settings: LabelingSettings) -> int:
    """Never fewer than `annotations_per_item`. A gold question is about the person, so each answer stands alone."""
    alone, overlap = settings.annotations_per_item, settings.overlap
    if item.gold_id is not None or overlap.people <= alone:
        return alone
    if in_share(f"overlap:{item.id}", overlap.share) or await _is_risky(session, item, overlap.risky):
        return overlap.people
    return alone


async def _is_risky(session: AsyncSession, item: ReviewItem, risky: RiskySettings) -> bool:
    if risky.severity is not None and item.severity >= risky.severity:
        return True
    if not set(risky.reasons).isdisjoint(item.reasons):
        return True
    if not risky.tags and not risky.kinds:
        return False
    said = (
        select(Feedback.kind, Feedback.tags)
        .join(ItemMember, col(ItemMember.feedback_id) == col(Feedback.id))
        .where(col(ItemMember.item_id) == item.id)
    )
    return _any_risky(((kind, tags) for kind, tags in await session.execute(said)), risky)


def _any_risky(said: Iterable[tuple[FeedbackKind, Mapping[str, str]]], risky: RiskySettings) -> bool:
    return any(kind in risky.kinds or any(_tagged(tags, wanted) for wanted in risky.tags) for kind, tags in said)


def _tagged(tags: Mapping[str, str], wanted: str) -> bool:
    name, has_value, value = wanted.partition("=")
    return name in tags and (not has_value or tags[name] == value)
