"""From what people said of an item to one label: accepted, disputed or refused with its reason."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime

from sqlalchemy.ext.asyncio import AsyncSession
from sqlmodel import col, select

from labeling.tables import Annotation, Label, LabelState, ReviewItem, Verdict
from labeling.wording import same_wording, spelled, stands_in

CORRECTING = (Verdict.WRONG, Verdict.UNSAFE, Verdict.PREFERRED)


@dataclass(frozen=True)
class Outcome:
    """`annotators`: all who spoke; `overlap`: how many of them say what the outcome says."""

    state: LabelState
    verdict: Verdict
    annotators: tuple[str, ...]
    correction: str | None = None
    must_contain: tuple[str, ...] = ()
    reason: str | None = None
    overlap: int = 1


def agree(
    flagged_answer: str, annotations: Iterable[Annotation], people_needed: int, other_answer: str | None = None
) -> Outcome | None:
    """None while too few people have spoken.

    Accepted is what at least `people_needed` people say and more than half of all who spoke: a third person settles
    the dispute of two. In which order annotations are given changes nothing; in which order people spoke, only whose
    wording is taken of several that count alike: the last.
    """
    spoken = last_of_each_person(annotations)
    if len(spoken) < people_needed:
        return None
    annotators = tuple(sorted(annotation.annotator for annotation in spoken))
    agreeing = [[other for other in spoken if say_the_same(one, other)] for one in spoken]
    most = max(map(len, agreeing))
    if most < people_needed or most * 2 <= len(spoken):
        reason = "people differ: " + "; ".join(f"{one.annotator}: {_summary(one)}" for one in spoken)
        return Outcome(LabelState.DISPUTED, _verdict(spoken[-1]), annotators, reason=reason, overlap=most)
    shown = (flagged_answer,) if other_answer is None else (flagged_answer, other_answer)
    # Two who agree with a third need not agree with each other: only the third one's words hold what both ask for.
    speaking = [(one, group) for one, group in zip(spoken, agreeing, strict=True) if len(group) == most]
    judged = [_judged(shown, one, group, annotators) for one, group in speaking]
    return next((one for one in reversed(judged) if one.state is LabelState.ACCEPTED), judged[-1])


def last_of_each_person(annotations: Iterable[Annotation]) -> list[Annotation]:
    """By their moment. Skipped and deleted ones don't speak; the free edition lets one person annotate a task twice."""
    live = [annotation for annotation in annotations if not (annotation.deleted or annotation.cancelled)]
    live.sort(key=_moment)
    return sorted({annotation.annotator: annotation for annotation in live}.values(), key=_moment)


def _moment(annotation: Annotation) -> tuple[datetime, int, int]:
    """Numbers repeat where Label Studio's project was made again."""
    return annotation.updated_at, annotation.labelling_project, annotation.annotation_id


def _verdict(annotation: Annotation) -> Verdict:
    return Verdict(annotation.verdict) if annotation.verdict else Verdict.CANNOT_TELL


def say_the_same(one: Annotation, other: Annotation) -> bool:
    """The same verdict; and where it corrects, the same wording, or every word that either asks for in both.

    Two people never word a long answer alike: `must_contain` says what counts. The prefilled correction below "good"
    means nothing.
    """
    if one.verdict != other.verdict or one.verdict not in CORRECTING:
        return one.verdict == other.verdict
    texts = (one.correction or "", other.correction or "")
    wanted = {*one.must_contain, *other.must_contain}
    return same_wording(*texts) or (bool(wanted) and all(stands_in(text, word) for text in texts for word in wanted))


def _summary(annotation: Annotation) -> str:
    correction = spelled(annotation.correction or "") if annotation.verdict in CORRECTING else ""
    return f"{annotation.verdict or 'no verdict'}{f' “{correction[:80]}”' if correction else ''}"


def _judged(
    shown: tuple[str, ...], speaking: Annotation, agreed: Sequence[Annotation], annotators: tuple[str, ...]
) -> Outcome:
    """What `speaking` says, with the words that all ask for who agree with it."""
    verdict = _verdict(speaking)
    correction = speaking.correction if verdict in CORRECTING else None
    if verdict is Verdict.UNSAFE and correction and _is_one_of(correction, shown):
        correction = None  # the prefilled text, left as it was: there is no safe answer yet
    wanted = tuple(dict.fromkeys(entry for annotation in agreed for entry in annotation.must_contain))
    reason = _refusal(shown, speaking, correction, wanted)
    state = LabelState.REFUSED if reason else LabelState.ACCEPTED
    return Outcome(state, verdict, annotators, correction, wanted, reason, len(agreed))


def _is_one_of(text: str, shown: tuple[str, ...]) -> bool:
    return any(same_wording(text, answer) for answer in shown)


def _refusal(
    shown: tuple[str, ...], annotation: Annotation, correction: str | None, wanted: tuple[str, ...]
) -> str | None:
    if annotation.verdict is None:
        return "no verdict was chosen"
    if annotation.verdict == Verdict.WRONG and not (correction or "").strip():
        return "the verdict is wrong, but the correction is empty"
    if annotation.verdict == Verdict.WRONG and _is_one_of(correction or "", shown):
        return "the verdict is wrong, but the correction is the flagged answer unchanged"
    right = shown[0] if annotation.verdict == Verdict.GOOD else correction
    missing = [entry for entry in wanted if right is not None and not stands_in(right, entry)]
    if missing:
        return f"the right answer itself lacks the words that it must contain: {', '.join(missing)}"
    return None


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
