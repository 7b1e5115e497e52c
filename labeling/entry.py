"""Which feedback enters the review queue, and how much of it a day: the rules of [projects.labeling.entry].

A rule lets in or leaves out for good; a full cap only holds back until the next day (UTC). Either way the feedback
stays stored, its column `entry` says what became of it, and the day's counts are kept.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from datetime import date as Date
from datetime import datetime, time, timedelta
from enum import StrEnum

from sqlalchemy import delete
from sqlalchemy.ext.asyncio import AsyncSession
from sqlmodel import col

from labeling.database import now
from labeling.draws import in_share
from labeling.settings import EntrySettings, LabelingSettings
from labeling.tables import EntryCount, Feedback, FeedbackKind, ReviewItem

SAMPLED = "sa_"  # beginnings of the ids of feedback that is our own: a sample of all traffic,
UNLIKELY = "lp_"  # and answers of low log-probability
OWN_RULES = {SAMPLED: "everything", UNLIKELY: "low_log_probability"}
RULES = {FeedbackKind.FLAG: "flags", FeedbackKind.RATING: "low_ratings"}
DAYS_KEPT = 2  # of what caps have counted; what rules left out is kept for good
LEFT_OUT, ENTERED = "left out", "entered"
HELD_BACK = "held back: "


class Way(StrEnum):
    QUEUE = "entered"
    GOOD_ANSWER = "good answer"
    COMMENT = "comment"
    LEFT_OUT = LEFT_OUT


def way(feedback: Feedback, settings: LabelingSettings) -> tuple[Way, str]:
    """Where it goes, and the rule that says so."""
    entry = settings.entry
    if (own := OWN_RULES.get(feedback.id[:3])) is not None:
        return Way.QUEUE, own
    if _tagged(feedback.tags, entry.leave_out_tags):
        return Way.LEFT_OUT, "leave_out_tags"
    if _tagged(feedback.tags, entry.tags):
        return Way.QUEUE, "tags"
    if feedback.kind is FeedbackKind.COMMENT:
        return Way.COMMENT, ""
    if feedback.kind is FeedbackKind.RATING and float(feedback.value) >= settings.low_rating:
        return Way.GOOD_ANSWER, ""
    rule = RULES.get(feedback.kind, "corrections")
    return (Way.QUEUE if in_share(f"{rule}: {feedback.id}", getattr(entry, rule)) else Way.LEFT_OUT), rule


def _tagged(tags: Mapping[str, str], wanted: Mapping[str, str]) -> bool:
    return any(name in tags and value in ("*", tags[name]) for name, value in wanted.items())


async def full_cap(
    session: AsyncSession, feedback: Feedback, entry: EntrySettings, item: ReviewItem | None = None
) -> str | None:
    """The first cap that has no room today; that of the item only where one is given."""
    for scope, name, cap in _caps(feedback, entry, item):
        row = await session.get(EntryCount, (feedback.project, _today(), scope, name))
        if row is not None and row.count >= cap:
            return scope
    return None


def _caps(feedback: Feedback, entry: EntrySettings, item: ReviewItem | None) -> Iterator[tuple[str, str, int]]:
    """(scope, name, most a day), of those that are set."""
    if entry.reporter_per_day is not None and feedback.reporter:
        yield "reporter", feedback.reporter, entry.reporter_per_day
    if entry.key_per_day is not None and feedback.key_id:
        yield "key", feedback.key_id, entry.key_per_day
    if entry.item_per_day is not None and item is not None:
        yield "item", item.id, entry.item_per_day
    if entry.project_per_day is not None:
        yield "project", "", entry.project_per_day


def hold_back(feedback: Feedback, scope: str) -> None:
    """It comes up again with the next day, before what came after it."""
    feedback.entry = f"{HELD_BACK}{scope}"
    feedback.held_until = datetime.combine(_today() + timedelta(days=1), time(), tzinfo=now().tzinfo)


async def leave_out(session: AsyncSession, feedback: Feedback, rule: str) -> None:
    feedback.entry = f"{LEFT_OUT}: {rule}"
    await _count(session, feedback.project, LEFT_OUT, rule)


async def let_in(session: AsyncSession, feedback: Feedback, rule: str, entry: EntrySettings, item: ReviewItem) -> None:
    feedback.entry, feedback.held_until = f"{ENTERED}: {rule}", None
    await _count(session, feedback.project, ENTERED, rule)
    for scope, name, _ in _caps(feedback, entry, item):
        await _count(session, feedback.project, scope, name)


async def _count(session: AsyncSession, project: str, scope: str, name: str) -> None:
    """By reading and adding: folding holds the project's lock."""
    row = await session.get(EntryCount, (project, _today(), scope, name))
    if row is None:
        row = EntryCount(project=project, day=_today(), scope=scope, name=name)
        if scope == ENTERED:  # the first of a rule today
            await _forget_counts(session, project)
        session.add(row)
        await session.flush()  # so that the next `get` finds it
    row.count += 1


async def _forget_counts(session: AsyncSession, project: str) -> None:
    """Of caps, whose day is over."""
    passing = col(EntryCount.scope).not_in((LEFT_OUT, ENTERED))
    old = col(EntryCount.day) < _today() - timedelta(days=DAYS_KEPT)
    await session.execute(delete(EntryCount).where(col(EntryCount.project) == project, old, passing))


def _today() -> Date:
    return now().date()
