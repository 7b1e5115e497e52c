"""Which labels a night trains on, and the rows and exam items that they become. Templates are the trainer's."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

from sqlalchemy.ext.asyncio import AsyncSession
from sqlmodel import col, select

from labeling.agreement import labels_ready
from labeling.name_recogniser import NamesNotRead
from labeling.redaction.redactor import Redactor
from labeling.shares import within_share
from labeling.tables import GoodAnswer, ItemWording, Label, ReviewItem
from labeling.wording import text_parts
from loop.scoring import ExamItem
from loop.tables import Adapter, LabelUse, Night, Serving

Row = dict[str, Any]
Kept = TypeVar("Kept")


@dataclass(frozen=True)
class ChosenLabels:
    """`new`: not in the adapter that serves. `replay`: older ones, trained again against forgetting. `earlier`: of the
    older ones, trained again or not, those whose answers are examined."""

    new: tuple[Label, ...]
    replay: tuple[Label, ...]
    held_out: tuple[Label, ...]  # never trained on; examined
    held_back: tuple[Label, ...]  # of a REJECTED night, until a person confirms them
    earlier: tuple[Label, ...] = ()
    above_share: tuple[Label, ...] = ()  # new ones that rest on one person alone, more than their share of the night

    @property
    def trained(self) -> tuple[Label, ...]:
        return self.new + self.replay


async def choose_labels(
    session: AsyncSession, project: str, replay_max_rows: int, share_alone: float = 1.0, examined: int = 0
) -> ChosenLabels:
    """`share_alone`: of the new labels, the most that may rest on one and the same person alone. `examined`: at most so
    many older ones."""
    ready = await labels_ready(session, project)
    used = await used_by_current(session, project)
    withheld = await held(session, project)
    trainable = [label for label in ready if not label.held_out]
    free = [label for label in trainable if label.id not in withheld]
    new = [label for label in free if label.id not in used or label.updated_at > used[label.id].created_at]
    newest = {label.id for label in new}
    taken, above_share = within_share(new, share_alone)
    older = sorted((label for label in free if label.id not in newest), key=_shuffled)
    return ChosenLabels(
        new=tuple(taken),
        replay=tuple(older[:replay_max_rows]),
        held_out=tuple(label for label in ready if label.held_out),
        held_back=tuple(label for label in trainable if label.id in withheld),
        earlier=tuple(sorted(older, key=_shuffled_for_exam)[:examined]),
        above_share=tuple(above_share),
    )


def _shuffled(label: Label) -> str:
    """A fixed order without favour: which older labels are replayed must not depend on their age."""
    return hashlib.sha256(label.id.encode()).hexdigest()


def _shuffled_for_exam(label: Label) -> str:
    """Another order: else the first ones would be those that are trained again, which are lost last."""
    return hashlib.sha256(f"exam {label.id}".encode()).hexdigest()


async def used_by_current(session: AsyncSession, project: str) -> dict[str, Night]:
    """Label id, or a thumb's -> the night of the serving adapter that trained on it."""
    serving = await session.get(Serving, project)
    adapter = await session.get(Adapter, serving.current) if serving else None
    if adapter is None or adapter.night_id is None:
        return {}
    night = await session.get(Night, adapter.night_id)
    assert night is not None
    uses = await session.execute(
        select(LabelUse.label_id).where(LabelUse.night_id == adapter.night_id, LabelUse.role != "held_out")
    )
    return dict.fromkeys(uses.scalars(), night)


async def held(session: AsyncSession, project: str) -> set[str]:
    """Labels and thumbs of a REJECTED night, until a person confirms them."""
    rows = await session.execute(
        select(LabelUse.label_id)
        .join(Night, col(Night.id) == col(LabelUse.night_id))
        .where(col(Night.project) == project, col(LabelUse.held).is_(True))
    )
    return set(rows.scalars())


async def good_answers(session: AsyncSession, project: str, limit: int) -> list[GoodAnswer]:
    """The newest good answers, less those whose prompt, in any wording, a labeller has corrected since."""
    corrected = {label.item_id for label in await labels_ready(session, project)}
    digests = select(ReviewItem.prompt_digest).where(col(ReviewItem.id).in_(corrected))
    wordings = select(ItemWording.prompt_digest).where(
        col(ItemWording.project) == project, col(ItemWording.item_digest).in_(digests)
    )
    rows = await session.execute(
        select(GoodAnswer)
        .where(
            col(GoodAnswer.project) == project,
            col(GoodAnswer.prompt_digest).not_in(digests),
            col(GoodAnswer.prompt_digest).not_in(wordings),
        )
        .order_by(col(GoodAnswer.created_at).desc(), col(GoodAnswer.id))
        .limit(limit)
    )
    return list(rows.scalars())


def redacted_labels(labels: Iterable[Label], by: Redactor) -> tuple[Label, ...]:
    """Labels as today's settings would have them: those made before redaction was on, or a pattern added, too.

    Without those whose names can't be recognised.
    """
    return tuple(readable(labels, _redacted_label, by))


def readable(rows: Iterable[Kept], redact: Callable[[Kept, Redactor], Kept], by: Redactor) -> Iterator[Kept]:
    """Redacted, without those whose names can't be recognised."""
    for row in rows:
        with contextlib.suppress(NamesNotRead):
            yield redact(row, by)


def _redacted_label(label: Label, by: Redactor) -> Label:
    said = [label.correction or "", *label.rejected, *label.must_contain]
    texts = by.open().exchange(label.messages, label.flagged_answer, said)
    if not texts.counts:
        return label
    correction, *others = texts.others
    rejected, must_contain = others[: len(label.rejected)], others[len(label.rejected) :]
    changed = {"messages": texts.messages, "flagged_answer": texts.answer, "must_contain": must_contain}
    changed["rejected"] = rejected
    return Label(**{**label.model_dump(), **changed, "correction": correction or None})


def redacted_good_answers(answers: Iterable[GoodAnswer], by: Redactor) -> list[GoodAnswer]:
    return list(readable(answers, _redacted_good_answer, by))


def _redacted_good_answer(good: GoodAnswer, by: Redactor) -> GoodAnswer:
    texts = by.open().exchange(good.messages, good.answer, good.must_contain)
    if not texts.counts:
        return good
    changed = {"messages": texts.messages, "answer": texts.answer, "must_contain": texts.others}
    return GoodAnswer(**{**good.model_dump(), **changed})


def label_row(label: Label) -> Row:
    """A conversational row whose last message, the correction, alone carries the loss."""
    assert label.correction is not None
    return answered_row(label.id, label.messages, label.correction)


def answered_row(name: str, prompt: Iterable[dict[str, Any]], answer: str) -> Row:
    said = [*map(plain_message, prompt), {"role": "assistant", "content": answer}]
    return {"id": name, "messages": said, "kind": "label"}


def plain_message(message: dict[str, Any]) -> dict[str, Any]:
    """Role and text, parts of text joined; what is no text stays, for the trainer's check to name."""
    role = "system" if message.get("role") == "developer" else message.get("role")
    content = message.get("content")
    if (parts := text_parts(content)) is not None:
        content = "".join(parts)
    rest = {key: value for key, value in message.items() if key not in {"role", "content", "name"}}
    return {"role": role, "content": content, **{key: value for key, value in rest.items() if value}}


def base_rows(answers: Iterable[tuple[str, str]]) -> list[Row]:
    """(prompt, the base's own answer) pairs: rows that hold the model where it was."""
    return [
        {
            "id": f"base_{index:05d}",
            "messages": [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}],
            "kind": "replay",
        }
        for index, (prompt, answer) in enumerate(answers)
    ]


def label_item(label: Label) -> ExamItem:
    return ExamItem(id=label.id, messages=label.messages, reference=label.correction, must_contain=label.must_contain)


def good_answer_item(good: GoodAnswer) -> ExamItem:
    return ExamItem(id=good.id, messages=good.messages, reference=good.answer, must_contain=good.must_contain)
