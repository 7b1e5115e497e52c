"""How well each labeller labels: gold questions answered rightly, agreement with others, labels that came of it."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from itertools import combinations
from statistics import median
from typing import Any

from sqlalchemy.ext.asyncio import AsyncSession
from sqlmodel import col, select

from labeling.agreement import last_of_each_person, say_the_same
from labeling.database import Database
from labeling.gold_answers import doubt, gold_accuracy
from labeling.proportions import Proportion
from labeling.settings import LabelingSettings
from labeling.tables import Annotation, Label, LabelState, ReviewItem


@dataclass
class _Work:
    """Of one person, while it is counted."""

    annotations: int = 0
    skipped: int = 0
    lead_seconds: list[float] = field(default_factory=list)
    last: datetime | None = None
    compared: int = 0
    agreed: int = 0
    labels: defaultdict[str, int] = field(default_factory=lambda: defaultdict(int))
    alone: int = 0
    waiting: int = 0


async def annotators_report(database: Database, project: str, settings: LabelingSettings) -> dict[str, Any]:
    """Per annotator, and the agreement of all beyond chance."""
    async with database.read() as session:
        said = await _said(session, project)
        labels = await session.execute(select(Label).where(col(Label.project) == project))
        by_item = {label.item_id: label for label in labels.scalars()}
        gold = await gold_accuracy(session, project)
    work: defaultdict[str, _Work] = defaultdict(_Work)
    verdicts: list[list[str]] = []
    for item_id, given in said.items():
        spoken = last_of_each_person(given)
        verdicts.append([annotation.verdict or "" for annotation in spoken])
        _count(work, given, spoken, by_item.get(item_id))
    return {
        "project": project,
        "items_by_several_people": sum(len(given) > 1 for given in verdicts),
        "verdict_alpha": krippendorff_alpha(verdicts),
        "annotators": [
            _row(name, work[name], gold.get(name, Proportion(0, 0)), settings) for name in sorted({*work, *gold})
        ],
    }


async def _said(session: AsyncSession, project: str) -> dict[str, list[Annotation]]:
    """Of users' items, gold questions left out."""
    rows = await session.execute(
        select(Annotation)
        .join(ReviewItem, col(ReviewItem.id) == col(Annotation.item_id))
        .where(
            col(ReviewItem.project) == project, col(ReviewItem.gold_id).is_(None), col(Annotation.deleted).is_(False)
        )
    )
    said: dict[str, list[Annotation]] = {}
    for annotation in rows.scalars():
        said.setdefault(annotation.item_id, []).append(annotation)
    return said


def _count(
    work: defaultdict[str, _Work], annotations: Sequence[Annotation], spoken: Sequence[Annotation], label: Label | None
) -> None:
    for annotation in annotations:
        one = work[annotation.annotator]
        one.annotations += not annotation.cancelled
        one.skipped += annotation.cancelled
        one.last = max(one.last or annotation.updated_at, annotation.updated_at)
        if annotation.lead_seconds and not annotation.cancelled:
            one.lead_seconds.append(annotation.lead_seconds)
    for pair in combinations(spoken, 2):
        same = say_the_same(*pair)
        for annotation in pair:
            work[annotation.annotator].compared += 1
            work[annotation.annotator].agreed += same
    for annotation in spoken:
        if label is None or label.state is LabelState.WITHDRAWN:
            work[annotation.annotator].waiting += 1
        else:
            work[annotation.annotator].labels[label.state] += 1
            work[annotation.annotator].alone += label.state is LabelState.ACCEPTED and label.overlap == 1


def _row(name: str, work: _Work, gold: Proportion, settings: LabelingSettings) -> dict[str, Any]:
    low, high = gold.interval
    return {
        "annotator": name,
        "annotations": work.annotations,
        "skipped": work.skipped,
        "accepted": work.labels[LabelState.ACCEPTED],
        "accepted_alone": work.alone,
        "refused": work.labels[LabelState.REFUSED],
        "disputed": work.labels[LabelState.DISPUTED],
        "waiting": work.waiting,
        "compared": work.compared,
        "agreement": work.agreed / work.compared if work.compared else None,
        "gold_answers": gold.n,
        "gold_right": gold.hits,
        "gold_accuracy": gold.share,
        "gold_interval": [low, high],
        "second_opinion_because": doubt(gold, settings.gold),
        "median_seconds": median(work.lead_seconds) if work.lead_seconds else None,
        "last_at": work.last,
    }


def krippendorff_alpha(units: Iterable[Sequence[str]]) -> float | None:
    """Nominal alpha (Krippendorff 2011): 1 is full agreement, 0 what chance gives. None without two to compare.

    Where everybody always gave one and the same value, chance can't be told from agreement: 1.
    """
    pairs: defaultdict[tuple[str, str], float] = defaultdict(float)
    for values in (unit for unit in units if len(unit) > 1):
        for one, other in combinations(values, 2):
            for pair in ((one, other), (other, one)):
                pairs[pair] += 1 / (len(values) - 1)
    total = sum(pairs.values())
    if not total:
        return None
    margin: defaultdict[str, float] = defaultdict(float)
    for (one, _), weight in pairs.items():
        margin[one] += weight
    seen = sum(weight for (one, other), weight in pairs.items() if one != other)
    by_chance = sum(margin[one] * margin[other] for one in margin for other in margin if one != other) / (total - 1)
    return 1.0 - seen / by_chance if by_chance else 1.0
