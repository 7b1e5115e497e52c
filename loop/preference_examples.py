"""Pairs out of labels, and thumbs out of what users rated without anybody having written a better answer."""

from __future__ import annotations

from collections.abc import Container, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from pydantic import ValidationError
from sqlalchemy.ext.asyncio import AsyncSession
from sqlmodel import col, select

from labeling.answers import calls_tools
from labeling.draws import in_share
from labeling.entry import SAMPLED, UNLIKELY
from labeling.redaction.redactor import Redactor
from labeling.settings import LabelingSettings
from labeling.tables import (
    Feedback,
    FeedbackKind,
    GoodAnswer,
    ItemMember,
    ItemState,
    Label,
    ReviewItem,
    Verdict,
)
from loop.scoring import ExamItem
from loop.tables import LabelUse
from loop.trainers.preference_rows import Pair, Thumb
from loop.training_examples import answered_row, held, plain_message, readable, used_by_current

NOT_BAD = (Verdict.GOOD, Verdict.CANNOT_TELL)
TRAINED_SHARE = 0.5  # of good answers, where thumbs are trained on; the others are examined
ROLE, AGAIN = "thumb", "thumb again"  # of a LabelUse: new to the adapter that served, or not


@dataclass(frozen=True)
class Rated:
    """An answer that users called good or bad; `id` is the good answer's or the review item's."""

    id: str
    messages: list[dict[str, Any]]
    answer: str
    good: bool


@dataclass(frozen=True)
class Thumbs:
    """None of them is held. `used`: ids in the adapter that serves."""

    rated: tuple[Rated, ...] = ()
    used: frozenset[str] = frozenset()

    @property
    def bad(self) -> list[Rated]:
        return [one for one in self.rated if not one.good]

    @property
    def ids(self) -> set[str]:
        return {one.id for one in self.rated}

    def new(self, kept: Container[str] | None = None) -> tuple[int, int]:
        """(good, bad) ones that the adapter has not seen; of `kept` ids only, where given."""
        new = [one for one in self.rated if one.id not in self.used and (kept is None or one.id in kept)]
        good = sum(one.good for one in new)
        return good, len(new) - good


def pairs_of(labels: Iterable[Label]) -> tuple[list[Pair], tuple[str, ...]]:
    """One for every shown answer that a label's correction beats; what no row can hold is left out by name."""
    pairs: list[Pair] = []
    unfit: list[str] = []
    for label in labels:
        for number, rejected in enumerate(label.rejected):
            name = f"{label.id}#{number}"
            if calls_tools(rejected):
                unfit.append(f"{name} left out of pairs: the answer that it beats calls tools")
                continue
            prompt = [plain_message(message) for message in label.messages]
            row = {"id": name, "prompt": prompt, "chosen": label.correction, "rejected": rejected}
            try:
                pairs.append(Pair.model_validate(row))
            except ValidationError as error:
                unfit.append(f"{name} left out of pairs: {error.errors()[0]['msg']}")
    return pairs, tuple(unfit)


def label_of(pair: Pair) -> str:
    """The id of the label that it comes from."""
    return pair.id.rpartition("#")[0]


def rejected_row(pair: Pair) -> dict[str, Any]:
    """Prompt and beaten answer, to be counted."""
    said = [message.model_dump() for message in pair.prompt]
    return {"id": pair.id, "messages": [*said, {"role": "assistant", "content": pair.rejected}]}


async def choose_thumbs(
    session: AsyncSession, project: str, good: Sequence[GoodAnswer], settings: LabelingSettings
) -> Thumbs:
    """`good`: the newest good answers, of which chance gives half to training."""
    withheld = await held(session, project)
    used = await used_by_current(session, project)
    bad = [
        Rated(item.id, item.messages, item.answer, False) for item in await _complained_of(session, project, settings)
    ]
    trained = [Rated(one.id, one.messages, one.answer, True) for one in good if is_trained(one.id)]
    return Thumbs(tuple(one for one in (*trained, *bad) if one.id not in withheld), frozenset(used))


def redacted_thumbs(thumbs: Thumbs, by: Redactor) -> Thumbs:
    """As today's settings would have them; without those whose names can't be recognised."""
    return replace(thumbs, rated=tuple(readable(thumbs.rated, _redacted, by)))


def _redacted(rated: Rated, by: Redactor) -> Rated:
    texts = by.open().exchange(rated.messages, rated.answer)
    return replace(rated, messages=texts.messages, answer=texts.answer)


def is_trained(good_answer: str) -> bool:
    """By hash of its id: the same in every night."""
    return in_share(f"thumb: {good_answer}", TRAINED_SHARE)


async def _complained_of(session: AsyncSession, project: str, settings: LabelingSettings) -> list[ReviewItem]:
    """Items that a user flagged or rated down, without a correction and not called good by a labeller since."""
    said = (
        select(Feedback.value, Feedback.kind, ReviewItem, Label)
        .join(ItemMember, col(ItemMember.feedback_id) == col(Feedback.id))
        .join(ReviewItem, col(ReviewItem.id) == col(ItemMember.item_id))
        .join(Label, col(Label.item_id) == col(ReviewItem.id), isouter=True)
        .where(
            col(ReviewItem.project) == project,
            col(ReviewItem.held_out).is_(False),
            col(ReviewItem.gold_id).is_(None),
            col(ReviewItem.state) != ItemState.WITHDRAWN,
            col(ReviewItem.other_answer).is_(None),
            col(Feedback.kind).in_((FeedbackKind.FLAG, FeedbackKind.RATING)),
            col(Feedback.id).not_like(f"{SAMPLED}%"),
            col(Feedback.id).not_like(f"{UNLIKELY}%"),
        )
        .order_by(col(ReviewItem.id))
    )
    items: dict[str, ReviewItem] = {}
    for value, kind, item, label in (await session.execute(said)).all():
        if kind is FeedbackKind.RATING and float(value) >= settings.low_rating:
            continue
        if label is None or not (label.correction or label.verdict in NOT_BAD):
            items[item.id] = item
    return list(items.values())


def thumb_rows(thumbs: Thumbs) -> list[dict[str, Any]]:
    """In the form of every training row, the rated answer last: they pass the same checks."""
    return [answered_row(one.id, one.messages, one.answer) for one in thumbs.rated]


def as_thumbs(rows: Iterable[dict[str, Any]], thumbs: Thumbs) -> list[Thumb]:
    """Of the rows that are thumbs."""
    good = {one.id: one.good for one in thumbs.rated}
    return [Thumb(id=row["id"], messages=row["messages"], good=good[row["id"]]) for row in rows if row["id"] in good]


def thumb_item(rated: Rated) -> ExamItem:
    """Nobody wrote the right answer: right is one that is no longer the bad one."""
    return ExamItem(id=rated.id, messages=rated.messages, not_again=rated.answer)


def thumb_uses(night_id: str, thumbs: Thumbs, kept: Container[str]) -> list[LabelUse]:
    return [
        LabelUse(night_id=night_id, label_id=one.id, item_id=one.id, role=AGAIN if one.id in thumbs.used else ROLE)
        for one in thumbs.rated
        if one.id in kept
    ]
