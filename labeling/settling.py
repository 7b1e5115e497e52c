"""An item's annotations become its label, or it waits for another person: a second opinion, a dispute's third."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from sqlalchemy import delete
from sqlalchemy.ext.asyncio import AsyncSession
from sqlmodel import col, select

from labeling.agreement import Outcome, agree, last_of_each_person
from labeling.crew import Crew
from labeling.database import insert_or_nothing, now
from labeling.overlap import people_needed
from labeling.redaction.redactor import placeholders
from labeling.settings import LabelingSettings
from labeling.tables import Annotation, GoodAnswer, ItemState, Label, LabelState, ReviewItem, Verdict
from labeling.wording import same_wording

_STATE_AFTER = {
    LabelState.ACCEPTED: ItemState.LABELLED,
    LabelState.REFUSED: ItemState.LABELLED,
    LabelState.DISPUTED: ItemState.DISPUTED,
}


async def settle(session: AsyncSession, item: ReviewItem, settings: LabelingSettings, crew: Crew) -> Label | None:
    """Brings the item's label up to its annotations; the label when something changed, otherwise None.

    `people_wanted` of the item says afterwards how many people are to be asked in all.
    """
    if item.state is ItemState.WITHDRAWN:
        return None
    rows = await session.execute(select(Annotation).where(col(Annotation.item_id) == item.id))
    annotations = list(rows.scalars())
    needed = await people_needed(session, item, settings)
    session.add(item)
    if item.gold_id is not None:
        _settle_gold(item, annotations, needed)
        return None
    outcome = _sayable(agree(item.answer, annotations, needed, item.other_answer), item)
    label = await session.get(Label, item.id)
    if outcome is None:
        item.people_wanted = needed
        return await _take_back(session, item, label, "its annotations were taken back")
    spoken = len(outcome.annotators)
    if (why := _waits(outcome, annotations, needed, label, crew)) is not None:
        item.people_wanted = spoken + 1
        return await _take_back(session, item, label, why)
    # A dispute that nobody else could settle stays open to whoever comes.
    unsettled = outcome.state is LabelState.DISPUTED and spoken < _most_asked(needed)
    item.people_wanted = spoken + 1 if unsettled else spoken
    item.state = _STATE_AFTER[outcome.state]
    if label is not None and _outcome_of(label) == outcome:
        return None
    if outcome.state is LabelState.ACCEPTED and outcome.overlap == 1:
        crew.alone_today[outcome.annotators[0]] += 1
    label = _written(label, item, outcome)
    session.add(label)
    await _keep_good_answer(session, item, outcome)
    return label


def _settle_gold(item: ReviewItem, annotations: Sequence[Annotation], needed: int) -> None:
    """It never becomes a label."""
    item.people_wanted = needed
    if len(last_of_each_person(annotations)) >= needed:
        item.state = ItemState.LABELLED
    elif item.state is ItemState.LABELLED:
        item.state = ItemState.PUSHED


def _sayable(outcome: Outcome | None, item: ReviewItem) -> Outcome | None:
    """Refused where the right answer holds a placeholder that its conversation lacks: trained, it would be said."""
    if outcome is None or outcome.state is not LabelState.ACCEPTED:
        return outcome
    right = item.answer if outcome.verdict is Verdict.GOOD else outcome.correction
    strange = placeholders([right, outcome.must_contain]) - placeholders(item.messages)
    if not strange:
        return outcome
    reason = (
        f"the right answer holds what redaction replaced ({', '.join(sorted(strange))}) and the conversation lacks; a "
        "model would say the placeholder. If the value is public, list it under labeling.redaction.keep"
    )
    return replace(outcome, state=LabelState.REFUSED, reason=reason)


def _waits(
    outcome: Outcome, annotations: Sequence[Annotation], needed: int, label: Label | None, crew: Crew
) -> str | None:
    """Why the item waits for one person more; None where the outcome stands."""
    asked = {annotation.annotator for annotation in annotations if not annotation.deleted}
    if outcome.state is LabelState.DISPUTED:
        # If there is anybody: who skipped it has had their turn.
        to_ask = len(outcome.annotators) < _most_asked(needed) and crew.people - asked
        return f"a third person is asked: {outcome.reason}" if to_ask else None
    if outcome.state is not LabelState.ACCEPTED or outcome.overlap > 1:
        return None
    (annotator,) = outcome.annotators
    if annotator not in crew.doubted and label is not None and label.state is LabelState.ACCEPTED:
        return None  # it had its turn: an edit does not cost another
    return crew.why_not_alone(annotator)


def _most_asked(needed: int) -> int:
    """One more than were needed, and never fewer than three: the third person decides between two."""
    return max(needed, 2) + 1


def _outcome_of(label: Label) -> Outcome:
    return Outcome(
        label.state,
        label.verdict,
        tuple(label.annotators),
        label.correction,
        tuple(label.must_contain),
        label.reason,
        label.overlap,
    )


async def _take_back(session: AsyncSession, item: ReviewItem, label: Label | None, why: str) -> Label | None:
    """The item is open to labellers again."""
    if item.state in (ItemState.LABELLED, ItemState.DISPUTED):
        item.state = ItemState.PUSHED
    if label is None or (label.state is LabelState.WITHDRAWN and label.reason == why):
        return None
    label.state, label.reason, label.updated_at = LabelState.WITHDRAWN, why, now()
    session.add(label)
    await _drop_good_answer(session, item)
    return label


def _written(label: Label | None, item: ReviewItem, outcome: Outcome) -> Label:
    moment = now()
    if label is None:
        label = Label(
            item_id=item.id,
            project=item.project,
            state=outcome.state,
            verdict=outcome.verdict,
            messages=item.messages,
            flagged_answer=item.answer,
            held_out=item.held_out,
            accepted_at=moment,
        )
    if outcome.state is LabelState.ACCEPTED and label.state is not LabelState.ACCEPTED:
        label.accepted_at = moment
    label.state, label.verdict, label.reason = outcome.state, outcome.verdict, outcome.reason
    label.correction, label.must_contain = outcome.correction, list(outcome.must_contain)
    label.annotators, label.overlap, label.updated_at = list(outcome.annotators), outcome.overlap, moment
    label.rejected = _beaten(item, outcome)
    preferred = outcome.verdict is Verdict.PREFERRED and label.rejected
    label.flagged_answer = label.rejected[0] if preferred else item.answer
    return label


def _beaten(item: ReviewItem, outcome: Outcome) -> list[str]:
    """The answers shown that the correction is better than: a preference's rejected ones."""
    if outcome.correction is None:
        return []
    shown = [item.answer] if item.other_answer is None else [item.answer, item.other_answer]
    return [answer for answer in shown if not same_wording(answer, outcome.correction)]


async def _keep_good_answer(session: AsyncSession, item: ReviewItem, outcome: Outcome) -> None:
    """A wrongly flagged answer joins those that must stay good, and leaves them when the verdict changes."""
    await _drop_good_answer(session, item)
    if (outcome.state, outcome.verdict) == (LabelState.ACCEPTED, Verdict.GOOD):
        good = GoodAnswer(
            id=_good_answer_id(item),
            project=item.project,
            prompt_digest=item.prompt_digest,
            messages=item.messages,
            answer=item.answer,
            must_contain=list(outcome.must_contain),
        )
        await session.execute(insert_or_nothing(session, good))


async def _drop_good_answer(session: AsyncSession, item: ReviewItem) -> None:
    """Only the label's own: what users rated good stays theirs."""
    await session.execute(delete(GoodAnswer).where(col(GoodAnswer.id) == _good_answer_id(item)))


def _good_answer_id(item: ReviewItem) -> str:
    return f"ga_{item.id}"
