"""Who labels a project: who could still be asked, whose word alone is doubted, how much each alone said today."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from datetime import timedelta

from sqlalchemy import exists
from sqlalchemy.ext.asyncio import AsyncSession
from sqlmodel import col, select

from labeling.database import now
from labeling.settings import AnnotatorSettings
from labeling.tables import Annotation, DoubtedAnnotator, Label, LabelState, ReviewItem

ACTIVE = timedelta(days=30)  # who has not labelled for longer is not waited for


@dataclass
class Crew:
    """Read once a pull; `people` and `alone_today` grow while it goes on."""

    people: set[str] = field(default_factory=set)
    doubted: Mapping[str, str] = field(default_factory=dict)  # annotator -> why
    alone_today: Counter[str] = field(default_factory=Counter)
    labels_per_day: int | None = None

    def met(self, annotators: Iterable[str]) -> None:
        self.people |= set(annotators)

    def why_not_alone(self, annotator: str) -> str | None:
        """Why what this person alone says needs a second one; None where it counts."""
        if annotator in self.doubted:
            return f"{annotator} alone says it, and {self.doubted[annotator]}"
        if self.labels_per_day is not None and self.alone_today[annotator] >= self.labels_per_day:
            return f"{annotator} alone says it, as of {self.labels_per_day} labels today: its turn comes tomorrow"
        return None


async def read_crew(session: AsyncSession, project: str, settings: AnnotatorSettings) -> Crew:
    # Not a join: SQLite would begin with the items, all that the project ever had.
    ours = exists().where(col(ReviewItem.id) == col(Annotation.item_id), col(ReviewItem.project) == project)
    active = (
        select(Annotation.annotator)
        .distinct()
        .where(col(Annotation.updated_at) > now() - ACTIVE, col(Annotation.deleted).is_(False), ours)
    )
    doubts = select(DoubtedAnnotator).where(col(DoubtedAnnotator.project) == project)
    return Crew(
        people=set((await session.execute(active)).scalars()),
        doubted={row.annotator: row.why for row in (await session.execute(doubts)).scalars()},
        alone_today=await _alone_today(session, project) if settings.labels_per_day else Counter(),
        labels_per_day=settings.labels_per_day,
    )


async def _alone_today(session: AsyncSession, project: str) -> Counter[str]:
    midnight = now().replace(hour=0, minute=0, second=0, microsecond=0)
    alone = select(Label.annotators).where(
        col(Label.project) == project,
        col(Label.state) == LabelState.ACCEPTED,
        col(Label.overlap) == 1,
        col(Label.accepted_at) >= midnight,
    )
    return Counter(annotators[0] for annotators in (await session.execute(alone)).scalars() if annotators)
