"""Fixes per label: of the labels that a promoted night examined, those whose prompt its adapter answers right.

Read from the rows that the night's exam has kept. A label counts once, with the first promoted night that examined it.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sqlalchemy.ext.asyncio import AsyncSession
from sqlmodel import col, select

from labeling.database import Database
from labeling.proportions import Proportion
from labeling.queue_report import comparison
from labeling.tables import Chosen, ReviewItem
from loop.digests import read_jsonl
from loop.tables import LabelUse, Promotion, StageMarker

NIGHTS = 60  # the newest promoted ones that are looked at
FAMILIES = ("trained", "held_out")
RIGHT = 1.0
IDS_PER_STATEMENT = 500


@dataclass(frozen=True)
class _Night:
    id: str
    folder: Path  # of its exam


async def label_fixes(database: Database, data_dir: Path, project: str) -> dict[str, Any]:
    """By score against at random; `unread` counts promoted nights whose rows are gone."""
    async with database.read() as session:
        nights = await _promoted(session, data_dir, project)
        labels = {night.id: await _labels(session, night.id) for night in nights}
    right: dict[str, bool] = {}  # by item
    unread = 0
    for night in nights:
        rows = await asyncio.to_thread(_examined, night.folder)
        unread += rows is None
        for label_id, is_right in (rows or {}).items():
            if label_id in labels[night.id]:
                right.setdefault(labels[night.id][label_id], is_right)
    async with database.read() as session:
        chosen = await _chosen(session, sorted(right))
    n, hits = Counter(chosen.values()), Counter(chosen[item] for item, is_right in right.items() if is_right)
    groups = {one: Proportion(hits[one], n[one]) for one in Chosen}
    return {**comparison(groups), "nights": len(nights), "unread": unread}


async def _promoted(session: AsyncSession, data_dir: Path, project: str) -> list[_Night]:
    """The oldest first."""
    rows = await session.execute(
        select(Promotion.night_id, StageMarker.folder)
        .join(StageMarker, col(StageMarker.night_id) == col(Promotion.night_id))
        .where(col(Promotion.project) == project, col(StageMarker.stage) == "evaluate")
        .order_by(col(Promotion.at).desc())
        .limit(NIGHTS)
    )
    nights = [_Night(str(night_id), data_dir / folder) for night_id, folder in rows][::-1]
    return list({night.id: night for night in nights}.values())


async def _labels(session: AsyncSession, night_id: str) -> dict[str, str]:
    """Label -> item."""
    rows = await session.execute(select(LabelUse.label_id, LabelUse.item_id).where(LabelUse.night_id == night_id))
    return {str(label_id): str(item_id) for label_id, item_id in rows}


def _examined(folder: Path) -> dict[str, bool] | None:
    """Label -> whether the candidate's answer was right; None where the files are no longer there."""
    files = [path for path in (folder / f"family-{name}.jsonl" for name in FAMILIES) if path.is_file()]
    try:
        rows = [row for path in files for row in read_jsonl(path)]
        return {str(row["id"]): (row["candidate"] or 0.0) >= RIGHT for row in rows} if files else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


async def _chosen(session: AsyncSession, items: list[str]) -> dict[str, Chosen]:
    found: dict[str, Chosen] = {}
    for start in range(0, len(items), IDS_PER_STATEMENT):
        some = col(ReviewItem.id).in_(items[start : start + IDS_PER_STATEMENT])
        rows = await session.execute(select(ReviewItem.id, ReviewItem.chosen).where(some))
        found |= {str(item_id): Chosen(chosen) for item_id, chosen in rows}
    return found
