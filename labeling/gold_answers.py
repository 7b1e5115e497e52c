"""What labellers answered to gold questions, and how often rightly."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection

from sqlalchemy.ext.asyncio import AsyncSession
from sqlmodel import col, select

from labeling.proportions import Proportion
from labeling.settings import GoldSettings
from labeling.tables import Annotation, GoldQuestion, ReviewItem, Verdict
from labeling.wording import folded, same_wording, stands_in


def doubt(accuracy: Proportion, settings: GoldSettings) -> str | None:
    """Why what this person alone says needs a second opinion. `accuracy`: right of all gold answers."""
    if accuracy.n < settings.min_answers or accuracy.hits >= settings.min_accuracy * accuracy.n:
        return None
    return f"answered {accuracy.hits} of {accuracy.n} gold questions rightly"


def is_right(question: GoldQuestion, annotation: Annotation) -> bool:
    """The verdict; and for a wrong answer what was to be written, in the words asked for or else in the wording."""
    if annotation.verdict != question.verdict:
        return False
    written = annotation.correction or ""
    match question.verdict:
        case Verdict.PREFERRED:
            return same_wording(written, question.other_answer or "")
        case Verdict.WRONG if question.must_contain:
            return all(stands_in(written, word) for word in question.must_contain)
        case Verdict.WRONG if question.correction:
            return _plain(written) == _plain(question.correction)
        case Verdict.WRONG:
            return bool(written.strip()) and not same_wording(written, question.answer)
    return True


def _plain(text: str) -> str:
    return folded(text).strip(" .,;:!?\"'")


async def gold_accuracy(
    session: AsyncSession, project: str, annotators: Collection[str] | None = None
) -> dict[str, Proportion]:
    """Of these people, or of all; who has answered no gold question is missing."""
    right: defaultdict[str, list[bool]] = defaultdict(list)
    for annotator, _, is_so in await first_answers(session, project, annotators):
        right[annotator].append(is_so)
    return {annotator: Proportion(sum(answers), len(answers)) for annotator, answers in right.items()}


async def first_answers(
    session: AsyncSession, project: str, annotators: Collection[str] | None = None
) -> list[tuple[str, str, bool]]:
    """(annotator, gold question, rightly): the first time that a person meets a question; later they may remember it.

    Edits of that first answer count.
    """
    # By the questions' project: by the items', SQLite would read all that the project ever had.
    answers = (
        select(Annotation, GoldQuestion)
        .join(ReviewItem, col(ReviewItem.id) == col(Annotation.item_id))
        .join(GoldQuestion, col(GoldQuestion.id) == col(ReviewItem.gold_id))
        .where(
            col(GoldQuestion.project) == project,
            col(Annotation.deleted).is_(False),
            col(Annotation.cancelled).is_(False),
        )
        .order_by(col(Annotation.labelling_project), col(Annotation.annotation_id))
    )
    if annotators is not None:
        answers = answers.where(col(Annotation.annotator).in_(sorted(annotators)))
    first: dict[tuple[str, str], bool] = {}
    for annotation, question in (await session.execute(answers)).all():
        first.setdefault((annotation.annotator, question.id), is_right(question, annotation))
    return [(annotator, gold_id, is_so) for (annotator, gold_id), is_so in first.items()]
