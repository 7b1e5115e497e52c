"""Several wordings of one question become one review item where a project asks for it; two questions never do."""

from __future__ import annotations

import asyncio
import json
import re
from collections import Counter
from datetime import timedelta
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from sqlalchemy import event, update
from sqlmodel import col, select

from labeling.database import Database, now
from labeling.feedback import fold, prompt_digest
from labeling.lexicon import is_common, is_unknown
from labeling.question_form import question_form
from labeling.same_question import same_question
from labeling.settings import LabelingSettings
from labeling.tables import (
    Feedback,
    FeedbackKind,
    FoldProgress,
    GoodAnswer,
    ItemMember,
    ItemState,
    ItemWording,
    Label,
    LabelState,
    ReviewItem,
    Verdict,
)
from loop.digests import read_jsonl
from loop.training_examples import good_answers
from service.demo.company import load
from tests.running import PROJECT, count, rows
from tests.unit.test_feedback import exchange, feedback, store

ROOT = Path(__file__).parents[2]
PAIRS = read_jsonl(ROOT / "service" / "bench" / "fold_pairs.jsonl")
NEAR = LabelingSettings(held_out_share=0, fold="near")
FIRST, SECOND, THIRD = (
    "Who founded Quillmere?",
    "Hi! Could you please tell me who founded Quillmere?",
    "who founded quillmere?? thanks",
)
OTHER = "Who is the mascot of Quillmere?"


def asked(text: str) -> list[dict[str, Any]]:
    return [{"role": "user", "content": text}]


@pytest.mark.parametrize("part", ["tuning", "held_out"])
def test_labelled_pairs(part: str) -> None:
    """No two questions are taken for one; nine in ten of the same wording are. Paraphrases stay apart."""
    merged: Counter[str] = Counter()
    total = Counter(pair["relation"] for pair in PAIRS if pair["part"] == part)
    for pair in PAIRS:
        if pair["part"] == part and same_question(asked(pair["one"]), asked(pair["other"])):
            merged[pair["relation"]] += 1
            assert pair["relation"] != "different", pair
    assert total["different"] > 100
    assert merged["wording"] >= 0.9 * total["wording"]
    assert merged["meaning"] == 0


def test_the_key_proposes_all_that_is_the_same() -> None:
    """An index of keys misses no pair that the comparison would accept."""
    found = 0
    for pair in PAIRS:
        one, other = question_form(asked(pair["one"])), question_form(asked(pair["other"]))
        if same_question(asked(pair["one"]), asked(pair["other"])):
            assert one is not None
            assert other is not None
            assert one.key == other.key, pair
            found += 1
    assert found > 100


def test_no_two_of_our_own_questions_merge() -> None:
    """1,268 questions of demo, probes and replay, each compared with all that its key proposes."""
    texts = [question.text for question in _demo_questions()]
    for path in ("loop/replay_prompts/general.jsonl", "loop/general_probes/probes.jsonl"):
        texts += [row.get("prompt") or row["question"] for row in read_jsonl(ROOT / path)]
    keys: dict[int, list[str]] = {}
    for text in {prompt_digest(asked(text)): text for text in texts}.values():
        form = question_form(asked(text))
        keys.setdefault(form.key if form else len(keys), []).append(text)
    assert len(keys) > 1000
    for same in keys.values():
        for one, other in combinations(same, 2):
            assert not same_question(asked(one), asked(other)), (one, other)


def _demo_questions() -> Any:
    company = load(ROOT / "service" / "demo_company")
    return [*company.asked(), *company.held_out()]


@given(st.text(max_size=200), st.text(max_size=200))
def test_any_text_can_be_compared(one: str, other: str) -> None:
    """Whatever people send: no error, the order of the two does not matter, a text is itself."""
    assert same_question(asked(one), asked(other)) == same_question(asked(other), asked(one))
    assert same_question(asked(one), asked(one)) == (question_form(asked(one)) is not None)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ([{"role": "system", "content": "a"}, *asked(FIRST)], asked(FIRST)),
        ([{"role": "system", "content": "a"}, *asked(FIRST)], [{"role": "system", "content": "b"}, *asked(FIRST)]),
        (
            [*asked(FIRST), {"role": "assistant", "content": "x"}],
            [*asked(SECOND), {"role": "assistant", "content": "x"}],
        ),
        (
            [*asked("a"), {"role": "assistant", "content": "x"}, *asked(FIRST)],
            [*asked("b"), {"role": "assistant", "content": "x"}, *asked(FIRST)],
        ),
        (
            [{"role": "user", "content": [{"type": "image_url"}]}],
            [{"role": "user", "content": [{"type": "image_url"}]}],
        ),
        ([{"role": "user", "content": FIRST, "tool_calls": [1]}], asked(FIRST)),
        (asked("x " * 20_000), asked("X " * 20_000)),
    ],
)
def test_only_the_last_question_may_be_worded_otherwise(one: Any, other: Any) -> None:
    """Another system text, another conversation before it, pictures, tool calls: not the same."""
    assert not same_question(one, other)


def test_hostile_text_is_not_looked_through_again_and_again() -> None:
    """Megabytes of marks and blanks would keep a fold busy for hours; greetings are taken off a few times only."""
    for text in (":" * 500_000 + "\n" * 500_000, " " * 1_000_000 + "x", "{\n" * 500_000):
        prompt_digest(asked(text))
    form = question_form(asked("please " * 2_800))
    assert form is not None
    assert len(form.tokens) > 2_700


def test_words_are_known_in_several_languages() -> None:
    """What the comparison of misspellings rests on."""
    assert all(map(is_common, ("address", "suscripción", "arbeiten", "recevoir", "bestelling")))
    assert all(map(is_unknown, ("adress", "suscripcion", "recieve", "quillmere")))
    assert not is_common("quillmere")
    assert not is_unknown("diary")


async def flagged(database: Database, *texts: str, fold_as: LabelingSettings = NEAR, **columns: Any) -> None:
    for text in texts:
        known = exchange(text, f"answer to {text}", **columns)
        await store(database, known, feedback(known))
    await fold(database, PROJECT, fold_as)


async def items(database: Database) -> list[ReviewItem]:
    return sorted(await rows(database, ReviewItem), key=lambda item: item.id)


async def test_wordings_fold_into_one_item(database: Database) -> None:
    """Counted together; the labeller sees the first wording and an answer to it; another fact stays apart."""
    await flagged(database, FIRST)
    await flagged(database, SECOND, OTHER)
    await flagged(database, THIRD, SECOND)
    one, other = await items(database)
    assert (one.messages, one.answer, one.count) == (asked(FIRST), f"answer to {FIRST}", 3 + 1)
    assert (other.messages, other.count) == (asked(OTHER), 1)
    assert await count(database, ItemMember) == 5
    await flagged(database, FIRST.upper())
    assert (await items(database))[0].answer == f"answer to {FIRST.upper()}", "the shown wording's newest answer"


async def test_default_folds_identical_prompts_only(database: Database) -> None:
    """Every wording a task of its own, and nothing is kept for folding."""
    await flagged(database, FIRST, SECOND, THIRD, FIRST.lower(), fold_as=LabelingSettings())
    assert [item.count for item in await items(database)] == [2, 1, 1]
    assert await count(database, ItemWording) == 0


async def test_every_question_of_the_demo_is_an_item(database: Database) -> None:
    """With default settings: what today's nights train on. At level `near` too, since none merely rewords another."""
    texts = [question.text for question in _demo_questions()]
    for settings in (LabelingSettings(), NEAR):
        await flagged(database, *texts, fold_as=settings)
        assert len(await items(database)) == len({prompt_digest(asked(text)) for text in texts}) == len(texts)


async def test_folding_together_makes_one_item(database: Database) -> None:
    """Four at once, as worker and night may: one item, every feedback counted once."""
    known = [exchange(text) for text in (FIRST, SECOND, THIRD, OTHER) * 5]
    await store(database, *(feedback(one) for one in known), *known)
    await asyncio.gather(*(count(database, Feedback) for _ in range(4)))
    folded = await asyncio.gather(*(fold(database, PROJECT, NEAR) for _ in range(4)))
    assert sum(folded) == 20
    assert sorted(item.count for item in await items(database)) == [5, 15]


async def test_older_items_are_known_once_it_is_switched_on(database: Database) -> None:
    """Items from before take part; a wording that has an item already keeps it; progress is kept."""
    await flagged(database, FIRST, OTHER, fold_as=LabelingSettings())
    await flagged(database, SECOND)
    assert [item.count for item in await items(database)] == [2, 1]
    progress = await rows(database, FoldProgress)
    await flagged(database, THIRD)
    assert [item.count for item in await items(database)] == [3, 1]
    await fold(database, PROJECT, NEAR)
    assert await rows(database, FoldProgress) == progress, "nothing new to learn"


async def test_a_wording_with_an_item_keeps_it(database: Database) -> None:
    """Two items of one question, from before: each goes on counting its own wording."""
    await flagged(database, FIRST, SECOND, fold_as=LabelingSettings())
    await flagged(database, SECOND, FIRST, THIRD)
    assert [item.count for item in await items(database)] == [3, 2]


async def test_projects_do_not_mix(database: Database) -> None:
    """The same question in another project is another item."""
    await flagged(database, FIRST)
    known = exchange(SECOND, project="other")
    await store(database, known, Feedback(project="other", kind=FeedbackKind.FLAG, exchange_id=known.id))
    await fold(database, "other", NEAR)
    assert [item.count for item in await items(database)] == [1, 1]


async def labelled(database: Database, held_out: bool) -> ReviewItem:
    async with database.write() as session:
        await session.execute(update(ReviewItem).values(state=ItemState.LABELLED, held_out=held_out))
        (item,) = (await session.execute(select(ReviewItem))).scalars()
        session.add(
            Label(
                item_id=item.id,
                project=PROJECT,
                messages=item.messages,
                state=LabelState.ACCEPTED,
                verdict=Verdict.WRONG,
                flagged_answer=item.answer,
                correction="Odalys Brandt.",
                held_out=held_out,
            )
        )
    return item


@pytest.mark.parametrize("held_out", [True, False])
async def test_a_wording_that_the_label_did_not_cure_gets_its_own_item(database: Database, held_out: bool) -> None:
    """Flagged again under a newer adapter: new evidence, a new task, never trained on where the first was held out."""
    await flagged(database, FIRST, SECOND)
    await labelled(database, held_out)
    later = now() + timedelta(minutes=1)
    await flagged(database, SECOND, served="bot@v2", created_at=later)
    await flagged(database, SECOND, served="bot@v2", created_at=later)
    first, second = await items(database)
    assert (first.count, second.count) == (2, 2)
    assert (second.messages, second.round, second.held_out) == (asked(SECOND), 1, held_out)


async def test_the_old_adapters_mistake_is_known_already(database: Database) -> None:
    """Another wording, answered by the adapter that was flagged: counted where the label is."""
    await flagged(database, FIRST)
    await labelled(database, False)
    await flagged(database, SECOND)
    assert [item.count for item in await items(database)] == [2]


async def test_comments_and_good_answers_know_the_wordings(database: Database) -> None:
    """A comment on another wording reaches the labeller; what was corrected is no good answer in any wording."""
    await flagged(database, FIRST, SECOND)
    said, good = exchange(SECOND), exchange(SECOND, "It was Bob.")
    other = exchange(OTHER, "A heron.")
    await store(database, said, feedback(said, kind=FeedbackKind.COMMENT, comment="no"), good, other)
    await store(database, *(feedback(one, kind=FeedbackKind.RATING, value=1.0) for one in (good, other)))
    await fold(database, PROJECT, NEAR)
    (item,) = await items(database)
    async with database.read() as session:
        members = select(ItemMember).where(col(ItemMember.item_id) == item.id)
        assert len((await session.execute(members)).all()) == 3
    assert await count(database, GoodAnswer) == 2
    await labelled(database, False)
    async with database.read() as session:
        assert [row.answer for row in await good_answers(session, PROJECT, 9)] == ["A heron."]


async def test_one_more_asks_the_database_as_often_whatever_lies_behind_it(database: Database) -> None:
    """Statements of one fold, with one item before it and with many."""
    statements: list[str] = []
    event.listen(database.engine.sync_engine, "before_cursor_execute", lambda *call: statements.append(call[2]))
    await flagged(database, FIRST)
    await flagged(database, "How long is the river?")
    statements.clear()
    await flagged(database, "How tall is the tower?")
    few = len(statements)
    await flagged(database, *(f"How high is mountain {number}?" for number in range(60)))
    statements.clear()
    await flagged(database, "How deep is the lake?")
    assert len(statements) == few


def test_blocks_of_code_are_compared_verbatim() -> None:
    """Indentation and upper case are part of a program; of a sentence they are not."""
    code = "Why does this fail?\n```\nif A:\n    b()\n```"
    assert prompt_digest(asked(code)) == prompt_digest(asked(code + "\n"))
    assert prompt_digest(asked(code)) != prompt_digest(asked(code.replace("    b", "  b")))
    assert prompt_digest(asked(code)) != prompt_digest(asked(code.lower()))
    plain = "def f(x):\n    return x"
    assert prompt_digest(asked(plain)) != prompt_digest(asked(plain.replace("    ", "")))
    assert prompt_digest(asked("Two\n   lines")) == prompt_digest(asked("two lines"))


def test_pairs_are_well_formed() -> None:
    """Each pair once, of a known part and relation."""
    seen = Counter(json.dumps([pair["one"], pair["other"]]) for pair in PAIRS)
    assert max(seen.values()) == 1
    assert {pair["part"] for pair in PAIRS} == {"tuning", "held_out"}
    assert {pair["relation"] for pair in PAIRS} == {"wording", "meaning", "different"}


async def test_every_look_up_is_by_an_index(database: Database) -> None:
    """SQLite's own plan of each statement of a fold: none reads a table through, nor all rows of a project."""
    if not database.is_sqlite:
        pytest.skip("plans of an empty PostgreSQL say nothing")
    await flagged(database, FIRST)
    statements: list[tuple[str, Any]] = []
    event.listen(database.engine.sync_engine, "before_cursor_execute", lambda *call: statements.append(call[2:4]))
    await flagged(database, SECOND, OTHER)
    asked_for = [(text, values) for text, values in statements if text.startswith(("SELECT", "UPDATE"))]
    assert len(asked_for) > 20
    async with database.engine.connect() as connection:
        for text, values in asked_for:
            plan = await connection.exec_driver_sql(f"EXPLAIN QUERY PLAN {text}", values)
            for line in [str(row._mapping["detail"]) for row in plan]:
                assert not line.startswith(("SCAN exch", "SCAN feed", "SCAN item", "SCAN rev")), (line, text)
                newest = re.search(
                    r"WHERE \w+\.project = \?(?: AND \w+\.gold_id IS NULL)? ORDER BY .*\s+LIMIT", text
                )  # the index's first few
                # The index of what is ready holds nothing else: its first few are read.
                assert "(project=?)" not in line or newest or "ix_feedback_ready" in line, (line, text)
                assert "ix_exchanges_age" not in line, (line, text)


CALL = {"role": "assistant", "tool_calls": [{"id": "1", "function": {"name": "weather", "arguments": "{}"}}]}


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ("What is 2⁵?", "What is 25?", False),
        ("Is print(X) right?", "Is print(x) right?", False),
        ("ＡＢＣ？", "abc?", True),
        ("Was  ist das?", "was ist\ndas?", True),
        ("cafe\u0301?", "Caf\u00e9?", True),
    ],
)
def test_identical_prompts(one: str, other: str, same: bool) -> None:
    """White space, width, case outside of code and composed letters are free; a power is no number beside another."""
    assert (prompt_digest(asked(one)) == prompt_digest(asked(other))) is same


def test_what_is_called_and_who_speaks_belong_to_a_prompt() -> None:
    """The calls' ids do not: each request makes them anew."""

    def digest(**message: Any) -> str:
        return prompt_digest([*asked("Weather?"), {**CALL, **message}])

    other = {"id": "1", "function": {"name": "news", "arguments": "{}"}}
    assert digest() == digest(tool_calls=[{**CALL["tool_calls"][0], "id": "2"}])  # type: ignore[dict-item]
    assert len({digest(), digest(tool_calls=[other]), digest(name="ann")}) == 3
