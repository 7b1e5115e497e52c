"""Feedback into the review queue: flags of one question fold into one item, good ratings become good answers.

Personal data and secrets go out here, once: items, good answers and all that comes of them hold redacted texts, and two
prompts that differ in nothing else are one.

Where a project has names replaced and the recogniser can't be asked, nothing is folded: it waits, and is tried again.

`fold` is run by the worker now and then and by each night's first stage; doing it again changes nothing.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import structlog
from sqlalchemy import text, update
from sqlalchemy.exc import DataError
from sqlalchemy.ext.asyncio import AsyncSession
from sqlmodel import col, select
from sqlmodel.sql.expression import SelectOfScalar

from labeling import entry
from labeling.answers import answer_text
from labeling.database import Database, insert_or_nothing, now, one_at_a_time
from labeling.draws import in_share
from labeling.entry import Way
from labeling.exchanges import link_due
from labeling.folding import Folding
from labeling.name_recogniser import NamesNotRead
from labeling.question_form import collapsed
from labeling.redaction.redactor import placeholders, redactor
from labeling.redaction.tally import count_replaced
from labeling.rescoring import queue_of, rescore
from labeling.sampling import sample
from labeling.selection import chosen, place
from labeling.settings import LabelingSettings
from labeling.tables import (
    HELD,
    READY,
    Exchange,
    Feedback,
    FeedbackKind,
    GoodAnswer,
    ItemMember,
    ItemState,
    ItemWithdrawal,
    Label,
    ReviewItem,
)
from labeling.wording import holds_code_block, text_parts

BATCH = 200
NAMES_AGAIN = timedelta(hours=1)  # until a feedback whose names could not be recognised is looked at again
# What a row's own content can raise, on reading it back or on folding it.
UNFIT = (ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, ValueError, DataError)
log = structlog.get_logger(__name__)


async def fold(database: Database, project: str, settings: LabelingSettings) -> int:
    """How many feedback were folded. What has neither exchange nor messages yet stays for a later call.

    One that can't be folded is left out by name and stops no other.
    """
    await sample(database, project, settings.entry)
    folded = await _fold_all(database, project, settings)
    await rescore(database, project, settings)
    return folded


async def _fold_all(database: Database, project: str, settings: LabelingSettings) -> int:
    folded = 0
    folding = Folding(project, settings)
    await folding.learn_older(database)
    await link_due(database, project)
    while True:
        async with database.write() as session:
            await one_at_a_time(session, queue_of(project))
            waiting = await _unfolded(session, project)
        if not waiting:
            return folded
        try:
            folded += await _fold_these(database, folding, waiting, settings)
        except (*UNFIT, NamesNotRead):
            for feedback_id in waiting:
                folded += await _fold_or_leave_out(database, folding, feedback_id, settings)


async def _fold_or_leave_out(database: Database, folding: Folding, feedback_id: str, settings: LabelingSettings) -> int:
    """Held back for a while where only its names could not be recognised: the next try may find them."""
    try:
        return await _fold_these(database, folding, [feedback_id], settings)
    except NamesNotRead as error:
        log.warning("names_not_recognised", project=folding.project, feedback=feedback_id, reason=str(error))
        held = {"entry": f"{entry.HELD_BACK}names", "held_until": now() + NAMES_AGAIN}
        async with database.write() as session:
            await session.execute(update(Feedback).where(col(Feedback.id) == feedback_id).values(**held))
        return 0
    except UNFIT as error:
        log.exception("feedback_left_out", project=folding.project, feedback=feedback_id, reason=type(error).__name__)
        async with database.write() as session:
            await session.execute(update(Feedback).where(col(Feedback.id) == feedback_id).values(folded_at=now()))
        return 0


async def _fold_these(
    database: Database, folding: Folding, feedback_ids: Sequence[str], settings: LabelingSettings
) -> int:
    """How many: another process may have folded some of them meanwhile."""
    cases = await _cases(database, feedback_ids, settings)
    await folding.read({case.digest: case.messages for case in cases.values()})
    folded = []
    async with database.write() as session:
        await one_at_a_time(session, queue_of(folding.project))
        for feedback in (await session.execute(_still_unfolded(feedback_ids))).scalars():
            case = cases.get(feedback.id)
            if case is not None and await _fold_one(session, folding, feedback, case, settings):
                folded.append(case)
    for case in folded:
        count_replaced(folding.project, case.redacted)
    return len(folded)


def _still_unfolded(feedback_ids: Sequence[str]) -> SelectOfScalar[Feedback]:
    return (
        select(Feedback)
        .where(col(Feedback.id).in_(feedback_ids), col(Feedback.folded_at).is_(None))
        .order_by(col(Feedback.created_at), col(Feedback.id))
    )


async def _cases(database: Database, feedback_ids: Sequence[str], settings: LabelingSettings) -> dict[str, _Case]:
    """By feedback. Before the transaction and in a thread: reading long texts must hold up neither writers nor loop."""
    rows = (
        select(Feedback, Exchange)
        .join(Exchange, col(Exchange.id) == col(Feedback.exchange_id), isouter=True)
        .where(col(Feedback.id).in_(feedback_ids))
    )
    async with database.read() as session:
        found = (await session.execute(rows)).all()
    return await asyncio.to_thread(
        lambda: {feedback.id: _case(feedback, exchange, settings) for feedback, exchange in found}
    )


def prompt_digest(messages: Sequence[dict[str, Any]]) -> str:
    """Of role, content, name and tool calls of every message; `collapsed`, and blocks of code verbatim."""
    lines = "\n\n".join(f"{_normal(m.get('role'))}\n{_normal(m.get('content'))}{_more(m)}" for m in messages)
    return "sha256:" + hashlib.sha256(lines.encode("utf-8", "surrogatepass")).hexdigest()


def _normal(content: Any) -> str:
    if (parts := text_parts(content)) is not None:
        content = " ".join(parts)
    plain = content if isinstance(content, str) else json.dumps(content, sort_keys=True)
    return unicodedata.normalize("NFC", plain).strip() if holds_code_block(plain) else collapsed(plain)


def _more(message: dict[str, Any]) -> str:
    """Who speaks and what is called; not the calls' ids, which every request makes anew."""
    calls = message.get("tool_calls")
    called = [call.get("function", call) if isinstance(call, dict) else call for call in calls or ()]
    said = {"name": message.get("name"), "tool_calls": called}
    return "\n" + json.dumps(said, sort_keys=True) if any(said.values()) else ""


def is_held_out(seed: str, share: float) -> bool:
    return in_share(seed, share)


@dataclass(frozen=True)
class _Case:
    """A feedback with the prompt and the answer that it is about; all texts redacted, those of `feedback` not."""

    feedback: Feedback
    exchange: Exchange | None
    messages: list[dict[str, Any]]
    answer: str
    digest: str
    prefilled: str | None
    comment: str | None
    must_contain: list[str]
    reasons: list[str]
    redacted: dict[str, int]

    @property
    def lacks_choice(self) -> bool:
        """It is said of a choice that its exchange does not have."""
        return self.exchange is not None and self.feedback.choice >= len(self.exchange.answers)

    @property
    def served(self) -> str | None:
        return self.exchange.served if self.exchange else None

    @property
    def other_answer(self) -> str | None:
        """A preference is shown as the two answers that it is about."""
        return self.prefilled if self.feedback.kind is FeedbackKind.PREFERENCE else None


async def _unfolded(session: AsyncSession, project: str) -> list[str]:
    """Ids, the oldest first; before all others those that a cap held back until now.

    What waits for its exchange or for another day is not read: each query has an index of just its rows.
    """
    ours, age = col(Feedback.project) == project, (col(Feedback.created_at), col(Feedback.id))
    held = select(Feedback.id).where(text(HELD), ours, col(Feedback.held_until) <= now())
    if due := (await session.execute(held.order_by(col(Feedback.held_until), *age).limit(BATCH))).scalars().all():
        return list(due)
    ready = select(Feedback.id).where(text(READY), ours)
    return list((await session.execute(ready.order_by(*age).limit(BATCH))).scalars())


async def _fold_one(
    session: AsyncSession, folding: Folding, feedback: Feedback, case: _Case, settings: LabelingSettings
) -> bool:
    """False where a cap holds it back."""
    goes, rule = (Way.LEFT_OUT, "no such choice") if case.lacks_choice else entry.way(feedback, settings)
    if goes is Way.QUEUE:
        return await _enter(session, folding, feedback, case, rule, settings)
    feedback.folded_at = now()
    match goes:
        case Way.COMMENT:
            feedback.entry = goes
            await _attach_comment(session, folding, case)
        case Way.GOOD_ANSWER:
            feedback.entry = goes
            await _keep_good_answer(session, case)
        case Way.LEFT_OUT:
            await entry.leave_out(session, feedback, rule)
    return True


async def _enter(
    session: AsyncSession,
    folding: Folding,
    feedback: Feedback,
    case: _Case,
    rule: str,
    settings: LabelingSettings,
) -> bool:
    if scope := await entry.full_cap(session, feedback, settings.entry):
        entry.hold_back(feedback, scope)
        return False
    item = await _item(session, folding, case, settings)
    if item.state is ItemState.WITHDRAWN:
        feedback.folded_at = now()
        await entry.leave_out(session, feedback, "withdrawn")
        return True
    if scope := await entry.full_cap(session, feedback, settings.entry, item):
        entry.hold_back(feedback, scope)
        return False
    feedback.folded_at = now()
    _add(item, case)
    place(item, settings.selection)
    await session.flush()
    session.add(_member(item, case))
    await entry.let_in(session, feedback, rule, settings.entry, item)
    if case.exchange is not None:
        await _bring_up_comments(session, case.exchange)
    return True


async def _bring_up_comments(session: AsyncSession, exchange: Exchange) -> None:
    """What was said of it while it was no problem yet: folded again, now that there is an item to show it with."""
    shown = select(ItemMember.feedback_id).where(col(ItemMember.feedback_id) == col(Feedback.id)).exists()
    said = (col(Feedback.exchange_id) == exchange.id) & (col(Feedback.kind) == FeedbackKind.COMMENT) & ~shown
    await session.execute(update(Feedback).where(said).values(folded_at=None))


def _member(item: ReviewItem, case: _Case) -> ItemMember:
    exchange_id = case.exchange.id if case.exchange else None
    return ItemMember(feedback_id=case.feedback.id, item_id=item.id, exchange_id=exchange_id, comment=case.comment)


def _case(feedback: Feedback, exchange: Exchange | None, settings: LabelingSettings) -> _Case:
    if exchange is not None:
        messages = exchange.messages
        answer = exchange.answers[feedback.choice] if feedback.choice < len(exchange.answers) else ""
    else:
        messages, answer = feedback.messages or [], feedback.answer or ""
    if feedback.kind is FeedbackKind.PREFERENCE:
        answer = answer_text(feedback.value["rejected"])
    offered = _offered(feedback)
    needed = [line.strip() for line in feedback.tags.get("must_contain", "").splitlines() if line.strip()]
    others = [offered or "", feedback.comment or "", *needed, *feedback.reasons]
    redacted = redactor(settings.redaction).open().exchange(messages, answer, others)
    prefilled, comment, *rest = redacted.others
    return _Case(
        feedback=feedback,
        exchange=exchange,
        messages=redacted.messages,
        answer=redacted.answer,
        digest=prompt_digest(redacted.messages),
        prefilled=prefilled if offered is not None else None,
        comment=comment or None,
        must_contain=rest[: len(needed)],
        reasons=rest[len(needed) :],
        redacted=redacted.counts,
    )


def _offered(feedback: Feedback) -> str | None:
    """The correction that the feedback brings along."""
    match feedback.kind:
        case FeedbackKind.CORRECTION:
            return answer_text(feedback.value)
        case FeedbackKind.PREFERENCE:
            return answer_text(feedback.value["chosen"])
    return None


async def _attach_comment(session: AsyncSession, folding: Folding, case: _Case) -> None:
    """A comment alone makes nothing a problem; where the prompt is one already, its labeller reads it."""
    digest = await folding.known(session, case.digest)
    item = (await session.execute(_rounds(folding.project, digest))).scalar_one_or_none()
    if item is not None and item.state is not ItemState.WITHDRAWN:
        session.add(_member(item, case))


async def _keep_good_answer(session: AsyncSession, case: _Case) -> None:
    """Not one with a value that its prompt lacks: no model can be asked to say <PHONE_1> of itself."""
    if placeholders([case.answer, case.must_contain]) - placeholders(case.messages):
        log.info("good_answer_not_kept", project=case.feedback.project, feedback=case.feedback.id, kinds=case.redacted)
        return
    row = GoodAnswer(
        project=case.feedback.project,
        prompt_digest=case.digest,
        messages=case.messages,
        answer=case.answer,
        exchange_id=case.exchange.id if case.exchange else None,
        must_contain=case.must_contain,
    )
    await session.execute(insert_or_nothing(session, row))


async def _item(session: AsyncSession, folding: Folding, case: _Case, settings: LabelingSettings) -> ReviewItem:
    digest = await folding.place(session, case.digest)
    latest = (await session.execute(_rounds(folding.project, digest))).scalar_one_or_none()
    if latest is not None and not await _recurred(session, latest, case):
        return latest
    if digest != case.digest:
        # The label of the other wording did not cure this one: what it teaches is worth a label of its own.
        await folding.stand_alone(session, case.digest)
    seed = case.exchange.id if case.exchange else case.digest
    item = ReviewItem(
        project=case.feedback.project,
        prompt_digest=case.digest,
        round=latest.round + 1 if latest and digest == case.digest else 1,
        messages=case.messages,
        answer=case.answer,
        # A prompt once held out stays so: it must never be trained on, nor another wording of it.
        held_out=latest.held_out if latest else is_held_out(seed, settings.held_out_share),
    )
    item.chosen = chosen(item.id, settings.selection)
    session.add(item)
    return item


def _rounds(project: str, digest: str) -> SelectOfScalar[ReviewItem]:
    """The newest item of this prompt."""
    return (
        select(ReviewItem)
        .where(col(ReviewItem.project) == project, col(ReviewItem.prompt_digest) == digest)
        .order_by(col(ReviewItem.round).desc())
        .limit(1)
        .with_for_update()
    )


async def _recurred(session: AsyncSession, item: ReviewItem, case: _Case) -> bool:
    """Wrong again although labelled: said of a newer answer, by another adapter than the one first flagged.

    One that was withdrawn comes back only so, too; what does not say which adapter answered stays out.
    """
    if item.state is ItemState.WITHDRAWN:
        return await _answered_anew(session, item, case)
    if item.state is not ItemState.LABELLED or (case.served is not None and case.served == item.served):
        return False
    label = await session.get(Label, item.id)
    at = case.exchange.created_at if case.exchange else case.feedback.created_at
    return label is not None and at > label.accepted_at


async def _answered_anew(session: AsyncSession, item: ReviewItem, case: _Case) -> bool:
    row = await session.get(ItemWithdrawal, item.id)
    if row is None or case.exchange is None or case.served == item.served:
        return False
    return case.exchange.created_at > row.at


def _add(item: ReviewItem, case: _Case) -> None:
    """Once a labeller may have seen the task, the answer and the offered correction stay as they were shown."""
    feedback = case.feedback
    item.count += 1
    item.severity = max(item.severity, feedback.severity) if item.count > 1 else feedback.severity
    item.reasons = [
        *item.reasons,
        *(reason for reason in dict.fromkeys(case.reasons) if reason not in item.reasons),
    ]
    if item.state is not ItemState.OPEN or (item.other_answer is not None and case.other_answer is None):
        return  # two answers to choose from stay together
    if case.digest == item.prompt_digest:
        if case.answer != item.answer:
            item.uncertainty, item.uncertainty_tries = None, 0
        item.answer, item.served, item.redacted = case.answer, case.served, case.redacted
        item.prefilled = case.prefilled or item.prefilled
        item.other_answer = case.other_answer
    else:  # said of another wording: the answer shown belongs to the prompt shown
        item.prefilled = item.prefilled or case.prefilled
