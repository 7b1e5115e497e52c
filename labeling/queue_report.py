"""The review queue in numbers: how long, how old, what waits outside, and whether choosing beats drawing by lot."""

from __future__ import annotations

from collections import Counter
from typing import Any

from sqlalchemy import func
from sqlalchemy.ext.asyncio import AsyncSession
from sqlmodel import col, select

from labeling.agreement import CORRECTING
from labeling.database import Database, now
from labeling.entry import HELD_BACK
from labeling.labeling_screen import content_text
from labeling.proportions import Proportion, difference
from labeling.tables import Chosen, EntryCount, Feedback, ItemState, Label, LabelState, ReviewItem

WAITING = (ItemState.OPEN, ItemState.PUSHED)
SETTLED = (LabelState.ACCEPTED, LabelState.REFUSED)
ENOUGH = 30  # in each group: below it, a comparison is only a hint


async def queue_report(database: Database, project: str) -> dict[str, Any]:
    """Counts are of now; those of the entry rules since the beginning, those of caps what they hold back now."""
    async with database.read() as session:
        states = await _states(session, project)
        oldest = await _oldest(session, project)
        entry = {"counts": await _rules(session, project), "held_back": await _held_back(session, project)}
        settled = await _settled(session, project)
    by_state: Counter[str] = Counter()
    for (state, _), count in states.items():
        by_state[state] += count
    return {
        "project": project,
        "length": sum(by_state[state] for state in WAITING),
        "oldest": oldest,
        "states": dict(by_state),
        "chosen": {
            chosen.value: {state: count for (state, one), count in states.items() if one == chosen} for chosen in Chosen
        },
        "entry": entry,
        "corrections": comparison(settled),
    }


def comparison(groups: dict[Chosen, Proportion]) -> dict[str, Any]:
    """By score against by lot, with 95 % intervals, and in words what may be said of it."""
    chosen, drawn = groups[Chosen.SCORE], groups[Chosen.RANDOM]
    found = difference(chosen, drawn)
    lift = chosen.share / drawn.share if chosen.share is not None and drawn.share else None
    return {
        "score": chosen.as_json(),
        "random": drawn.as_json(),
        "difference": found and {"seen": round(found[0], 4), "interval": [round(found[1], 4), round(found[2], 4)]},
        "lift": lift and round(lift, 3),
        "verdict": _verdict(chosen, drawn, found),
    }


def _verdict(chosen: Proportion, drawn: Proportion, found: tuple[float, float, float] | None) -> str:
    few = min(chosen.n, drawn.n)
    if found is None:
        return f"nothing to compare yet: {chosen.n} by score, {drawn.n} at random"
    _, low, high = found
    if low > 0:
        said = "chosen by score is better"
    elif high < 0:
        said = "chosen at random is better: look at the weights in [projects.labeling.selection]"
    else:
        said = "no difference shown"
    return f"{said}; with {few} in the smaller group that is a hint only" if few < ENOUGH else said


async def _states(session: AsyncSession, project: str) -> dict[tuple[str, Chosen], int]:
    rows = await session.execute(
        select(ReviewItem.state, ReviewItem.chosen, func.count())
        .where(col(ReviewItem.project) == project, col(ReviewItem.gold_id).is_(None))
        .group_by(col(ReviewItem.state), col(ReviewItem.chosen))
    )
    return {(ItemState(state).value, Chosen(chosen)): count for state, chosen, count in rows}


async def _oldest(session: AsyncSession, project: str) -> dict[str, Any] | None:
    first = (
        select(ReviewItem)
        .where(
            col(ReviewItem.project) == project,
            col(ReviewItem.gold_id).is_(None),
            col(ReviewItem.state).in_(WAITING),
        )
        .order_by(col(ReviewItem.created_at), col(ReviewItem.id))
        .limit(1)
    )
    item = (await session.execute(first)).scalar_one_or_none()
    if item is None:
        return None
    hours = (now() - item.created_at).total_seconds() / 3600
    return {"id": item.id, "since": item.created_at.isoformat(), "hours": round(hours, 2)}


async def _rules(session: AsyncSession, project: str) -> dict[str, dict[str, int]]:
    """{"entered" or "left out": {rule: feedback}}."""
    rows = await session.execute(
        select(EntryCount.scope, EntryCount.name, func.sum(EntryCount.count))
        .where(col(EntryCount.project) == project, col(EntryCount.scope).in_(("entered", "left out")))
        .group_by(col(EntryCount.scope), col(EntryCount.name))
    )
    found: dict[str, dict[str, int]] = {"entered": {}, "left out": {}}
    for scope, name, count in rows:
        found[scope][name] = int(count)
    return found


async def _held_back(session: AsyncSession, project: str) -> dict[str, dict[str, Any]]:
    """By cap, or `names` (could not be recognised): how many wait, since when, and when the next may enter."""
    columns: tuple[Any, ...] = (
        col(Feedback.entry),
        func.count(),
        func.min(col(Feedback.created_at)),
        func.min(col(Feedback.held_until)),
    )
    held = col(Feedback.folded_at).is_(None) & col(Feedback.held_until).is_not(None)
    rows = await session.execute(
        select(*columns).where(col(Feedback.project) == project, held).group_by(col(Feedback.entry))
    )
    return {
        str(entry).removeprefix(HELD_BACK): {
            "waiting": count,
            "oldest": oldest.isoformat(),
            "enters_from": until.isoformat(),
        }
        for entry, count, oldest, until in rows
    }


async def _settled(session: AsyncSession, project: str) -> dict[Chosen, Proportion]:
    """Items that people have judged, and those of them that gave a correction."""
    columns: tuple[Any, ...] = (
        col(ReviewItem.chosen),
        col(Label.state),
        col(Label.verdict),
        col(Label.correction).is_not(None),
    )
    counted: tuple[Any, ...] = (*columns, func.count())
    rows = await session.execute(
        select(*counted)
        .join(ReviewItem, col(ReviewItem.id) == col(Label.item_id))
        .where(col(Label.project) == project, col(Label.state).in_(SETTLED))
        .group_by(*columns)
    )
    n: Counter[Chosen] = Counter()
    corrected: Counter[Chosen] = Counter()
    for chosen, state, verdict, has_correction, count in rows:
        n[chosen] += count
        if state is LabelState.ACCEPTED and verdict in CORRECTING and has_correction:
            corrected[chosen] += count
    return {chosen: Proportion(corrected[chosen], n[chosen]) for chosen in Chosen}


async def next_items(database: Database, project: str, limit: int) -> list[dict[str, Any]]:
    """The head of the queue, with what each place was made of."""
    head = (
        select(ReviewItem)
        .where(
            col(ReviewItem.project) == project,
            col(ReviewItem.gold_id).is_(None),
            col(ReviewItem.state).in_(WAITING),
        )
        .order_by(col(ReviewItem.score).desc(), col(ReviewItem.created_at), col(ReviewItem.id))
        .limit(limit)
    )
    async with database.read() as session:
        items = (await session.execute(head)).scalars().all()
    return [
        {
            "id": item.id,
            "state": item.state,
            "task": item.task_id,
            "score": item.score,
            "chosen": item.chosen,
            "factors": item.factors,
            "severity": item.severity,
            "uncertainty": item.uncertainty,
            "novelty": item.novelty,
            "count": item.count,
            "reasons": item.reasons,
            "prompt": content_text(item.messages[-1].get("content")) if item.messages else "",
            "created_at": item.created_at.isoformat(),
        }
        for item in items
    ]
