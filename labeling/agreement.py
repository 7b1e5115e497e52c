"""From what people said of an item to one label: accepted, disputed or refused with its reason."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from sqlalchemy import delete
from sqlalchemy.ext.asyncio import AsyncSession
from sqlmodel import col, select

from labeling.database import insert_or_nothing, now
from labeling.redaction.redactor import placeholders
from labeling.tables import Annotation, GoodAnswer, ItemState, Label, LabelState, ReviewItem, Verdict
from labeling.wording import same_wording, spelled, stands_in

CORRECTING = (Verdict.WRONG, Verdict.UNSAFE)
_STATE_AFTER = {
    LabelState.ACCEPTED: ItemState.LABELLED,
    LabelState.REFUSED: ItemState.LABELLED,
    LabelState.DISPUTED: ItemState.DISPUTED,
}


@dataclass(frozen=True)
class Outcome:
    state: LabelState
    verdict: Verdict
    annotators: tuple[str, ...]
    correction: str | None = None
    must_contain: tuple[str, ...] = ()
    reason: str | None = None


def agree(flagged_answer: str, annotations: Iterable[Annotation], people_needed: int) -> Outcome | None:
    """None while too few people have spoken.

    Accepted is what at least `people_needed` people say and more than half of all who spoke: a third person settles
    the dispute of two.
    """
    spoken = _last_of_each_person(annotations)
    if len(spoken) < people_needed:
        return None
    annotators = tuple(sorted(annotation.annotator for annotation in spoken))
    (stand, backers), *_ = Counter(map(_stand, spoken)).most_common()
    if backers < people_needed or backers * 2 <= len(spoken):
        reason = "people differ: " + "; ".join(f"{one.annotator}: {_summary(one)}" for one in spoken)
        return Outcome(LabelState.DISPUTED, _verdict(spoken[-1]), annotators, reason=reason)
    return _judged(flagged_answer, [one for one in spoken if _stand(one) == stand], annotators)


def _last_of_each_person(annotations: Iterable[Annotation]) -> list[Annotation]:
    """Skipped and deleted ones don't speak; the free edition lets one person annotate a task twice."""
    live = [annotation for annotation in annotations if not (annotation.deleted or annotation.cancelled)]
    live.sort(key=lambda annotation: (annotation.updated_at, annotation.annotation_id))
    return list({annotation.annotator: annotation for annotation in live}.values())


def _verdict(annotation: Annotation) -> Verdict:
    return Verdict(annotation.verdict) if annotation.verdict else Verdict.CANNOT_TELL


def _stand(annotation: Annotation) -> tuple[str | None, str]:
    """What has to be equal for two people to agree. The prefilled correction below "good" means nothing."""
    correcting = annotation.verdict in CORRECTING
    return annotation.verdict, spelled(annotation.correction or "") if correcting else ""


def _summary(annotation: Annotation) -> str:
    verdict, correction = _stand(annotation)
    return f"{verdict or 'no verdict'}{f' “{correction[:80]}”' if correction else ''}"


def _judged(flagged_answer: str, agreed: Sequence[Annotation], annotators: tuple[str, ...]) -> Outcome:
    last = agreed[-1]
    verdict = _verdict(last)
    correction = last.correction if verdict in CORRECTING else None
    if verdict is Verdict.UNSAFE and correction and same_wording(correction, flagged_answer):
        correction = None  # the prefilled text, left as it was: there is no safe answer yet
    wanted = tuple(dict.fromkeys(entry for annotation in agreed for entry in annotation.must_contain))
    reason = _refusal(flagged_answer, last, correction, wanted)
    state = LabelState.REFUSED if reason else LabelState.ACCEPTED
    return Outcome(state, verdict, annotators, correction, wanted, reason)


def _refusal(
    flagged_answer: str, annotation: Annotation, correction: str | None, wanted: tuple[str, ...]
) -> str | None:
    if annotation.verdict is None:
        return "no verdict was chosen"
    if annotation.verdict == Verdict.WRONG and not (correction or "").strip():
        return "the verdict is wrong, but the correction is empty"
    if annotation.verdict == Verdict.WRONG and same_wording(correction or "", flagged_answer):
        return "the verdict is wrong, but the correction is the flagged answer unchanged"
    right = flagged_answer if annotation.verdict == Verdict.GOOD else correction
    missing = [entry for entry in wanted if right is not None and not stands_in(right, entry)]
    if missing:
        return f"the right answer itself lacks the words that it must contain: {', '.join(missing)}"
    return None


async def settle(session: AsyncSession, item: ReviewItem, people_needed: int) -> Label | None:
    """Brings the item's label up to its annotations; the label when something changed, otherwise None."""
    if item.state is ItemState.WITHDRAWN:
        return None
    rows = await session.execute(select(Annotation).where(col(Annotation.item_id) == item.id))
    outcome = _sayable(agree(item.answer, rows.scalars(), people_needed), item)
    label = await session.get(Label, item.id)
    if outcome is None:
        return await _take_back(session, item, label)
    item.state = _STATE_AFTER[outcome.state]
    session.add(item)
    if label is not None and _outcome_of(label) == outcome:
        return None
    label = _written(label, item, outcome)
    session.add(label)
    await _keep_good_answer(session, item, outcome)
    return label


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


def _outcome_of(label: Label) -> Outcome:
    return Outcome(
        label.state,
        label.verdict,
        tuple(label.annotators),
        label.correction,
        tuple(label.must_contain),
        label.reason,
    )


async def _take_back(session: AsyncSession, item: ReviewItem, label: Label | None) -> Label | None:
    """Annotations were deleted or skipped since: the item is open to labellers again."""
    if item.state in (ItemState.LABELLED, ItemState.DISPUTED):
        item.state = ItemState.PUSHED
        session.add(item)
    if label is None or label.state is LabelState.WITHDRAWN:
        return None
    label.state, label.reason, label.updated_at = LabelState.WITHDRAWN, "its annotations were taken back", now()
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
    label.annotators, label.updated_at = list(outcome.annotators), moment
    return label


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


async def labels_ready(session: AsyncSession, project: str) -> list[Label]:
    """Accepted labels with a correction, oldest first: what may be trained on or examined.

    One a prompt: where it was flagged again after its label, the newest round's counts.
    """
    rows = await session.execute(
        select(Label, ReviewItem.prompt_digest)
        .join(ReviewItem, col(ReviewItem.id) == col(Label.item_id))
        .where(
            col(Label.project) == project,
            col(Label.state) == LabelState.ACCEPTED,
            col(Label.verdict).in_(CORRECTING),
            col(Label.correction).is_not(None),
        )
        .order_by(col(ReviewItem.round))
    )
    newest = {digest: label for label, digest in rows.all()}
    return sorted(newest.values(), key=lambda label: (label.accepted_at, label.id))
