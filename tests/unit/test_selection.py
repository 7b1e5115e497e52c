"""Which item comes next: factors, the random slice, novelty against what is labelled, and scores that follow."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
from sqlalchemy import update
from sqlmodel import col

from labeling.database import Database, now
from labeling.embeddings import HashedNgrams
from labeling.feedback import fold
from labeling.labelled_index import LabelledIndex, asked_text
from labeling.rescoring import rescore
from labeling.selection import FLOOR, Signals, chosen, factors, place, score
from labeling.settings import LabelingSettings, SelectionSettings
from labeling.tables import Chosen, Feedback, FeedbackKind, ItemState, Label, LabelState, ReviewItem, Verdict
from tests.running import PROJECT, rows

ALL_SCORED = LabelingSettings(selection=SelectionSettings(random_share=0))
SCORED = ALL_SCORED.selection


def flag(text: str, **columns: Any) -> Feedback:
    messages = [{"role": "user", "content": text}]
    return Feedback(project=PROJECT, kind=FeedbackKind.FLAG, messages=messages, answer="Wrong", **columns)


async def store(database: Database, *stored: Any) -> None:
    async with database.write() as session:
        session.add_all(stored)


async def label(database: Database, item: ReviewItem, state: LabelState = LabelState.ACCEPTED) -> None:
    async with database.write() as session:
        values: dict[str, Any] = {"messages": item.messages, "state": state, "verdict": Verdict.WRONG}
        await session.merge(
            Label(item_id=item.id, id=f"lb_{item.id}", project=PROJECT, flagged_answer="", updated_at=now(), **values)
        )
        done = update(ReviewItem).where(col(ReviewItem.id) == item.id)
        await session.execute(done.values(state=ItemState.LABELLED))


async def items_by_text(database: Database) -> dict[str, ReviewItem]:
    return {item.messages[-1]["content"]: item for item in await rows(database, ReviewItem)}


@pytest.mark.parametrize("name", ["severity", "uncertainty", "novelty", "count"])
def test_score_rises_with_each_signal(name: str) -> None:
    """Within 0..1, and never falling: with one weight switched off, that signal alone does nothing."""
    values = [1, 2, 5, 30, 1000] if name == "count" else [0.0, 0.2, 0.5, 0.9, 1.0]
    known: dict[str, Any] = {"severity": 0.5, "count": 3, "uncertainty": 0.5, "novelty": 0.5}
    found = [factors(Signals(**{**known, name: value})) for value in values]
    scores = [score(one, SCORED) for one in found]
    assert all(a < b for a, b in itertools.pairwise(scores))
    assert scores[0] > 0
    assert scores[-1] <= 1
    off = SelectionSettings.model_validate({"traffic" if name == "count" else name: 0})
    assert len({score(one, off) for one in found}) == 1


def test_the_unknown_is_middling() -> None:
    """Neither preferred to what is known nor put behind it."""
    unknown = score(factors(Signals(0.5, 1)), SCORED)
    assert unknown == score(factors(Signals(0.5, 1, uncertainty=0.5, novelty=0.5)), SCORED)
    assert score(factors(Signals(0.5, 1, uncertainty=0.2)), SCORED) < unknown
    assert score(factors(Signals(0.5, 1, uncertainty=0.8)), SCORED) > unknown
    assert min(factors(Signals(0, 1, uncertainty=0, novelty=0)).values()) >= FLOOR


def test_random_slice_is_the_share_asked_for_and_fixed() -> None:
    settings = SelectionSettings(random_share=0.2)
    marks = [chosen(f"it_{i}", settings) for i in range(4000)]
    assert marks == [chosen(f"it_{i}", settings) for i in range(4000)]
    assert 0.17 < marks.count(Chosen.RANDOM) / 4000 < 0.23


def test_lots_are_ranks_among_the_others() -> None:
    """Items of the random slice lie as far apart as the scores of the rest, whatever they are about."""
    others = sorted(np.random.default_rng(0).beta(2, 8, 200).tolist())
    drawn = []
    for number in range(2000):
        item = ReviewItem(id=f"it_{number}", project=PROJECT, prompt_digest="", messages=[], answer="")
        item.chosen, item.severity, item.count = Chosen.RANDOM, (number % 2) * 1.0, 1 + number % 50
        place(item, SCORED, others)
        drawn.append(item.score)
    for share in (0.1, 0.5, 0.9):
        assert abs(np.quantile(drawn, share) - np.quantile(others, share)) < 0.03
    severe, mild = drawn[1::2], drawn[::2]
    assert abs(np.mean(severe) - np.mean(mild)) < 0.01


async def test_near_what_is_labelled_comes_later(database: Database) -> None:
    """Alike but for novelty: what was labelled pulls down its neighbours only, and taking it back lifts them again."""
    near, other = "Which colour has the flag of Norway today?", "How much is the toll at the bridge?"
    await store(database, flag("Which colour has the flag of Norway?"), flag(near), flag(other))
    await fold(database, PROJECT, ALL_SCORED)
    before = await items_by_text(database)
    assert {item.novelty for item in before.values()} == {1.0}
    assert len({item.score for item in before.values()}) == 1
    async with database.write() as session:
        pushed = update(ReviewItem).where(col(ReviewItem.id) == before[near].id)
        await session.execute(pushed.values(state=ItemState.PUSHED))
    await label(database, before["Which colour has the flag of Norway?"])
    await rescore(database, PROJECT, ALL_SCORED)
    after = await items_by_text(database)
    assert (after[near].novelty or 0) < 0.5
    assert after[near].score < after[other].score
    assert after[near].factors["novelty"] < after[other].factors["novelty"]
    assert await rescore(database, PROJECT, ALL_SCORED) == 0, "nothing was labelled since"
    await label(database, before["Which colour has the flag of Norway?"], LabelState.WITHDRAWN)
    await rescore(database, PROJECT, ALL_SCORED)
    assert (await items_by_text(database))[near].novelty == 1.0


async def test_flagged_again_is_not_pulled_down_by_its_own_label(database: Database) -> None:
    """Its label did not cure it: novelty says nothing then."""
    await store(database, flag("Who runs it?"))
    await fold(database, PROJECT, ALL_SCORED)
    (item,) = await rows(database, ReviewItem)
    await label(database, item)
    await store(database, flag("Who runs it?"))
    await fold(database, PROJECT, ALL_SCORED)
    second = max(await rows(database, ReviewItem), key=lambda one: one.round)
    assert (second.round, second.novelty) == (2, None)


def test_index_is_bounded_and_forgets_the_oldest() -> None:
    index = LabelledIndex(HashedNgrams(64), sample=3)
    index.add(["a", "b", "c", "d"], ["one thing", "two things", "three things", "four things"])
    assert len(index) == 3
    assert ("a" in index, "d" in index) == (False, True)
    assert index.novelty(["four things"]) == [0.0]
    index.remove("d")
    assert index.novelty(["four things"])[0] > 0.1
    index.add(["b"], ["entirely else"])
    assert index.novelty(["entirely else"]) == [0.0]


def test_asked_text_is_what_the_user_said() -> None:
    """The system's words are everybody's; an assistant's are no question; the end of a long conversation counts."""
    said = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "x" * 5000}]
    said += [{"role": "assistant", "content": "Yes."}, {"role": "user", "content": "And now?"}]
    text = asked_text(said)
    assert text.endswith("And now?")
    assert ("kind" in text, "Yes" in text, len(text)) == (False, False, 2000)
    assert asked_text([{"role": "user", "content": None}]) == ""
