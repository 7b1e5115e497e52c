"""Gold questions: their right verdict is known. Slipped among the tasks, they tell how well a labeller labels.

They are review items of their own (`gold_id`), never labels: nothing is trained on them, and users' items are counted
without them.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Sequence
from functools import partial
from typing import Any

from pydantic import ConfigDict, Field, ValidationError, model_validator
from sqlalchemy import func, update
from sqlalchemy.ext.asyncio import AsyncSession
from sqlmodel import col, select

from labeling.database import Database, insert_or_nothing
from labeling.draws import in_share
from labeling.errors import InvalidInput, NotFound
from labeling.gold_answers import first_answers
from labeling.settings import GoldSettings, Strict
from labeling.tables import GoldQuestion, ItemState, ReviewItem, Verdict
from labeling.wording import same_wording, stands_in

MISTAKES_NAMED = 100
ROWS_PER_STATEMENT = 200


class InvalidGold(InvalidInput):
    """`mistakes`: a list of {field, message}; the field begins with the question's number, from 1."""

    code = "invalid_gold"
    default_hint = (
        "One JSON object a line: question (or messages), answer, verdict (good, wrong, can't tell, unsafe) and, for "
        "wrong, correction or must_contain; or question, chosen and rejected."
    )

    def __init__(self, mistakes: list[dict[str, str]]) -> None:
        listed = "; ".join(f"{m['field']}: {m['message']}" for m in mistakes[:20])
        super().__init__(f"the gold questions have {len(mistakes)} mistake(s): {listed}")
        self.mistakes = mistakes


class UnknownGold(NotFound):
    code = "unknown_gold"
    default_hint = "`nightschool gold list` has the ids."


class GoldBody(Strict):
    """A question to test labellers with: an answer and its right verdict, or two answers and the better one."""

    model_config = ConfigDict(extra="forbid", frozen=True, str_strip_whitespace=True)

    question: str | None = Field(None, min_length=1, description="Short for one user message")
    messages: list[dict[str, Any]] | None = Field(None, min_length=1)
    answer: str | None = Field(None, min_length=1, description="Shown as the flagged answer")
    verdict: Verdict | None = None
    correction: str | None = Field(None, description="The right answer; compared only where must_contain is empty")
    must_contain: list[str] = Field(
        default_factory=list, description="Words of every right answer, alternatives as a|b"
    )
    chosen: str | None = Field(None, min_length=1)
    rejected: str | None = Field(None, min_length=1)

    @model_validator(mode="after")
    def _whole(self) -> GoldBody:
        if (self.question is None) == (self.messages is None):
            raise ValueError("give question, or messages")
        if self.chosen is not None or self.rejected is not None:
            self._check_pair()
        elif self.answer is None or self.verdict in (None, Verdict.PREFERRED):
            raise ValueError("give answer and verdict (good, wrong, can't tell, unsafe), or chosen and rejected")
        missing = [word for word in self.must_contain if self.correction and not stands_in(self.correction, word)]
        if missing:
            raise ValueError(f"the correction lacks the words that it must contain: {', '.join(missing)}")
        if self.correction and self.answer and same_wording(self.correction, self.answer):
            raise ValueError("the correction is the answer itself")
        return self

    def _check_pair(self) -> None:
        if self.chosen is None or self.rejected is None or self.answer is not None or self.verdict is not None:
            raise ValueError("chosen and rejected go together, without answer and verdict")
        if same_wording(self.chosen, self.rejected):
            raise ValueError("chosen and rejected are the same text")


def gold_question(project: str, body: GoldBody) -> GoldQuestion:
    """The id comes from what a labeller sees: the same question again is the same row."""
    messages = body.messages or [{"role": "user", "content": body.question}]
    answer = body.answer or body.rejected
    assert answer is not None, "the body was checked"
    shown = json.dumps([project, messages, answer, body.chosen], sort_keys=True)
    return GoldQuestion(
        id=f"gq_{hashlib.sha256(shown.encode('utf-8', 'surrogatepass')).hexdigest()[:27]}",
        project=project,
        messages=messages,
        answer=answer,
        other_answer=body.chosen,
        verdict=body.verdict or Verdict.PREFERRED,
        correction=body.correction,
        must_contain=body.must_contain,
    )


def parse_gold(raw: Sequence[Any]) -> list[GoldBody]:
    """Raises InvalidGold with every mistake."""
    bodies: list[GoldBody] = []
    mistakes: list[dict[str, str]] = []
    for number, one in enumerate(raw, start=1):
        try:
            bodies.append(GoldBody.model_validate(one))
        except ValidationError as error:
            for found in error.errors():
                place = ".".join(map(str, (number, *found["loc"])))
                mistakes.append({"field": place, "message": found["msg"].removeprefix("Value error, ")})
    if mistakes:
        raise InvalidGold(mistakes[:MISTAKES_NAMED])
    return bodies


async def add_gold(database: Database, project: str, bodies: Sequence[GoldBody]) -> int:
    """How many are new. One that was retired is asked again; what is right about a known one may change."""
    questions = {question.id: question for question in (gold_question(project, body) for body in bodies)}
    added = 0
    async with database.write() as session:
        for question in questions.values():
            known = await session.get(GoldQuestion, question.id)
            added += known is None
            session.add(question if known is None else _renewed(known, question))
    return added


def _renewed(known: GoldQuestion, given: GoldQuestion) -> GoldQuestion:
    known.verdict, known.correction = given.verdict, given.correction
    known.must_contain, known.retired = given.must_contain, False
    return known


async def retire_gold(database: Database, project: str, gold_id: str) -> None:
    async with database.write() as session:
        ours = (col(GoldQuestion.id) == gold_id) & (col(GoldQuestion.project) == project)
        retire = update(GoldQuestion).where(ours).values(retired=True).returning(col(GoldQuestion.id))
        if (await session.execute(retire)).scalar_one_or_none() is None:
            raise UnknownGold(f"project {project!r} has no gold question {gold_id!r}")
        unseen = (col(ReviewItem.gold_id) == gold_id) & col(ReviewItem.state).in_((ItemState.OPEN, ItemState.PUSHED))
        await session.execute(update(ReviewItem).where(unseen).values(state=ItemState.WITHDRAWN))


async def gold_questions(database: Database, project: str) -> list[dict[str, Any]]:
    """Each with how often it was asked and answered, and how often rightly: one that all get wrong may be wrong."""
    async with database.read() as session:
        rows = await session.execute(
            select(GoldQuestion).where(col(GoldQuestion.project) == project).order_by(col(GoldQuestion.created_at))
        )
        questions, asked = list(rows.scalars()), await _asked(session, project)
        answers: Counter[str] = Counter()
        right: Counter[str] = Counter()
        for _, gold_id, is_so in await first_answers(session, project):
            answers[gold_id] += 1
            right[gold_id] += is_so
    return [
        {**one.model_dump(), "asked": asked[one.id], "answers": answers[one.id], "right": right[one.id]}
        for one in questions
    ]


async def slip_in(
    session: AsyncSession, project: str, items: Sequence[ReviewItem], settings: GoldSettings
) -> list[ReviewItem]:
    """Gold items to be pushed beside `items`: drawn by these, so that doing it again makes no more of them.

    Each looks like the item that drew it, whose place in the queue it shares. The question asked least comes next.
    """
    beside = settings.share / (1 - settings.share)  # a share of all tasks sent, not of the users' ones
    drawing = [item for item in items if item.gold_id is None and in_share(f"gold:{item.id}", beside)]
    if not drawing:
        return []
    questions = {row.id: row for row in (await session.execute(_live(project))).scalars()}
    if not questions:
        return []
    asked = await _asked(session, project)
    made = {}
    for item in drawing:
        chosen = min(questions, key=partial(_turn, asked, item.id))
        gold = _disguised(questions[chosen], item)
        made[gold.id] = gold
        asked[chosen] += 1
    return await _kept(session, made, {item.id for item in items})


async def _kept(session: AsyncSession, made: dict[str, ReviewItem], there: set[str]) -> list[ReviewItem]:
    """As they are stored, less those that wait among the items already, or were sent before."""
    kept: list[ReviewItem] = []
    ids = sorted(made.keys() - there)
    for start in range(0, len(ids), ROWS_PER_STATEMENT):
        part = ids[start : start + ROWS_PER_STATEMENT]
        await session.execute(insert_or_nothing(session, *(made[item_id] for item_id in part)))
        waiting = col(ReviewItem.id).in_(part) & (col(ReviewItem.state) == ItemState.OPEN)
        kept += (await session.execute(select(ReviewItem).where(waiting))).scalars()
    return kept


def _live(project: str) -> Any:
    return select(GoldQuestion).where(col(GoldQuestion.project) == project, col(GoldQuestion.retired).is_(False))


async def _asked(session: AsyncSession, project: str) -> Counter[str]:
    rows = await session.execute(
        select(col(ReviewItem.gold_id), func.count())
        .where(col(ReviewItem.project) == project, col(ReviewItem.gold_id).is_not(None))
        .group_by(col(ReviewItem.gold_id))
    )
    return Counter({str(gold_id): count for gold_id, count in rows.all()})


def _turn(asked: Counter[str], item_id: str, gold_id: str) -> tuple[int, bytes]:
    """The least asked first; among equals, another one each time."""
    return asked[gold_id], hashlib.sha256(f"{gold_id}{item_id}".encode()).digest()


def _disguised(question: GoldQuestion, beside: ReviewItem) -> ReviewItem:
    number = hashlib.sha256(f"gold:{beside.id}".encode()).hexdigest()
    return ReviewItem(
        id=f"{beside.id[:14]}{number[: len(beside.id) - 14]}",
        project=question.project,
        prompt_digest=f"gold:{beside.id}",  # no prompt has it: users' feedback never folds into a gold item
        messages=question.messages,
        answer=question.answer,
        other_answer=question.other_answer,
        served=beside.served,
        reasons=beside.reasons,
        count=beside.count,
        severity=beside.severity,
        score=beside.score,
        chosen=beside.chosen,
        scored_at=beside.scored_at,
        held_out=True,
        gold_id=question.id,
    )
