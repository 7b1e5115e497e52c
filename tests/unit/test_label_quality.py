"""How good labels are: overlap, a third person, gold questions, what one person alone may say, and preferences."""

from __future__ import annotations

from collections import Counter
from datetime import timedelta
from typing import Any

import pytest
from sqlmodel import select

from labeling.accepted_labels import accepted_labels, preference_pairs
from labeling.agreement import labels_ready
from labeling.annotators import annotators_report, krippendorff_alpha
from labeling.crew import read_crew
from labeling.database import Database, new_id, now
from labeling.gold import InvalidGold, add_gold, gold_questions, parse_gold, retire_gold, slip_in
from labeling.labeling_screen import Opinion, in_order, task_data
from labeling.overlap import people_needed
from labeling.preferences import meant
from labeling.settings import GoldSettings, LabelingSettings
from labeling.settling import settle
from labeling.shares import within_share
from labeling.standing import follow_standing
from labeling.tables import (
    Annotation,
    Feedback,
    FeedbackKind,
    GoodAnswer,
    ItemMember,
    ItemState,
    Label,
    LabelState,
    ReviewItem,
    Verdict,
)
from tests.running import rows

PROJECT = "support-bot"
ALONE = LabelingSettings()
TWO = LabelingSettings(annotations_per_item=2)
LYON = {"question": "The capital of France?", "answer": "Lyon.", "verdict": "wrong", "must_contain": ["Paris"]}


def item(**values: Any) -> ReviewItem:
    defaults = {"messages": [{"role": "user", "content": "How long?"}], "answer": "30 days.", "state": ItemState.PUSHED}
    return ReviewItem(project=PROJECT, prompt_digest=new_id("pd"), **{**defaults, **values})


class Table:
    """Items before people who annotate, without a Label Studio between them."""

    def __init__(self, database: Database, settings: LabelingSettings) -> None:
        self.database, self.settings = database, settings
        self._number = 0

    async def lay(self, *items: ReviewItem) -> None:
        async with self.database.write() as session:
            session.add_all(items)

    async def says(
        self, annotator: str, one: ReviewItem, verdict: str | None, text: str | None = None, **v: Any
    ) -> None:
        self._number += 1
        opinion = meant(one, Opinion(verdict, text))
        annotation = Annotation(
            labelling_project=1,
            annotation_id=self._number,
            item_id=one.id,
            annotator=annotator,
            verdict=opinion.verdict,
            correction=opinion.correction,
            updated_at=now(),
            **v,
        )
        async with self.database.write() as session:
            session.add(annotation)
        await self.settle(one)
        await follow_standing(self.database, PROJECT, self.settings, {annotator})

    async def settle(self, one: ReviewItem) -> None:
        async with self.database.write() as session:
            crew = await read_crew(session, PROJECT, self.settings.annotators)
            stored = await session.get(ReviewItem, one.id)
            assert stored is not None
            await settle(session, stored, self.settings, crew)

    async def item(self, one: ReviewItem) -> ReviewItem:
        async with self.database.read() as session:
            found = await session.get(ReviewItem, one.id)
        assert found is not None
        return found

    async def label(self, one: ReviewItem) -> Label | None:
        async with self.database.read() as session:
            return await session.get(Label, one.id)

    async def state(self, one: ReviewItem) -> tuple[ItemState, LabelState | None, int]:
        label, stored = await self.label(one), await self.item(one)
        return stored.state, label.state if label else None, stored.people_wanted


ACCEPTED = (ItemState.LABELLED, LabelState.ACCEPTED)


# overlap


async def test_a_share_of_items_is_labelled_by_two(database: Database) -> None:
    """Drawn by the item's id: always the same ones, about as many as the share says, none at the default."""
    settings = LabelingSettings(overlap={"share": 0.25})
    items = [item() for _ in range(400)]
    async with database.read() as session:
        first = [await people_needed(session, one, settings) for one in items]
        again = [await people_needed(session, one, settings) for one in items]
        assert {await people_needed(session, one, ALONE) for one in items} == {1}
    assert first == again
    assert 60 < Counter(first)[2] < 140


@pytest.mark.parametrize(
    ("risky", "is_so"),
    [
        ({"reasons": ["medical"]}, True),
        ({"reasons": ["legal"]}, False),
        ({"severity": 0.9}, True),
        ({"severity": 0.95}, False),
        ({"tags": ["topic"]}, True),
        ({"tags": ["topic=medicine"]}, True),
        ({"tags": ["topic=law"]}, False),
        ({"kinds": ["correction"]}, True),
        ({"kinds": ["preference"]}, False),
        ({}, False),
    ],
)
async def test_risky_items_need_more_people(database: Database, risky: dict[str, Any], is_so: bool) -> None:
    """By reason, severity, tag or kind of any feedback on it, as the settings say."""
    one = item(reasons=["wrong", "medical"], severity=0.9)
    said = Feedback(project=PROJECT, kind=FeedbackKind.CORRECTION, value="x", tags={"topic": "medicine"})
    async with database.write() as session:
        session.add_all([one, said])
        await session.flush()
        session.add(ItemMember(feedback_id=said.id, item_id=one.id))
    settings = LabelingSettings(overlap={"people": 3, "risky": risky})
    async with database.read() as session:
        assert await people_needed(session, one, settings) == (3 if is_so else 1)


async def test_a_dispute_is_put_before_a_third_person(database: Database) -> None:
    """Who is known to label and has not said anything of it yet; their word decides, and the label says how many."""
    table, one, other = Table(database, TWO), item(), item()
    await table.lay(one, other)
    await table.says("cid", other, "good")
    await table.says("ann", one, "wrong", "14 days.")
    assert await table.state(one) == (ItemState.PUSHED, None, 2)
    await table.says("bob", one, "good")
    assert await table.state(one) == (ItemState.PUSHED, None, 3)
    await table.says("cid", one, "wrong", "14 days.")
    assert await table.state(one) == (*ACCEPTED, 3)
    label = await table.label(one)
    assert label is not None
    assert (label.annotators, label.overlap, label.rejected) == (["ann", "bob", "cid"], 2, ["30 days."])


async def test_it_is_disputed_after_the_third_or_when_nobody_is_left(database: Database) -> None:
    """Nobody is left where all who label have spoken or skipped it; whoever comes later may still decide."""
    table, one, two = Table(database, TWO), item(), item()
    await table.lay(one, two)
    await table.says("ann", one, "wrong", "14 days.")
    await table.says("bob", one, "good")
    assert await table.state(one) == (ItemState.DISPUTED, LabelState.DISPUTED, 3)
    await table.says("cid", one, "can't tell")
    assert await table.state(one) == (ItemState.DISPUTED, LabelState.DISPUTED, 3)
    await table.says("ann", two, "wrong", "14 days.")
    await table.says("cid", two, None, cancelled=True)
    await table.says("bob", two, "good")
    assert (await table.state(two))[0] is ItemState.DISPUTED


# gold questions


async def test_gold_questions_are_slipped_in_once_and_look_like_the_others(database: Database) -> None:
    """In the rate configured; pushing again draws the same ones, and what is told of them gives nothing away."""
    await add_gold(database, PROJECT, parse_gold([LYON, {**LYON, "question": "Of Italy?", "must_contain": ["Rome"]}]))
    items = [item(state=ItemState.OPEN, count=3, reasons=["wrong"], score=0.7) for _ in range(400)]
    async with database.write() as session:
        session.add_all(items)
        gold = await slip_in(session, PROJECT, items, GoldSettings(share=0.2))
        assert await slip_in(session, PROJECT, [*items, *gold], GoldSettings(share=0.2)) == []
        assert await slip_in(session, PROJECT, items, GoldSettings(share=0)) == []
    assert 70 < len(gold) < 130  # a fifth of all tasks: 100 beside 400
    assert abs(len({one.id for one in gold if "Italy" in str(one.messages)}) - len(gold) / 2) <= 1
    assert {len(one.id) for one in gold} == {len(one.id) for one in items}
    assert {task_data(one)["why"] for one in gold} == {task_data(items[0])["why"]}


async def test_gold_questions_never_become_labels(database: Database) -> None:
    """Nor good answers; an answer to one is no work on users' items."""
    table = Table(database, ALONE)
    await add_gold(database, PROJECT, parse_gold([LYON]))
    one = item(state=ItemState.OPEN)
    await table.lay(one)
    async with database.write() as session:
        (gold,) = await slip_in(session, PROJECT, [one], GoldSettings(share=0.5))
    await table.says("ann", gold, "wrong", "Paris.")
    await table.says("bob", gold, "good")
    assert (await table.item(gold)).state is ItemState.LABELLED
    assert (await rows(database, Label), await rows(database, GoodAnswer)) == ([], [])
    (asked,) = await gold_questions(database, PROJECT)
    assert (asked["asked"], asked["answers"], asked["right"]) == (1, 2, 1)
    report = await annotators_report(database, PROJECT, ALONE)
    assert [(who["annotator"], who["annotations"], who["gold_right"]) for who in report["annotators"]] == [
        ("ann", 0, 1),
        ("bob", 0, 0),
    ]


async def test_a_retired_question_is_asked_no_more(database: Database) -> None:
    """Nor are the tasks kept that nobody has answered yet; added again, it is asked again."""
    await add_gold(database, PROJECT, parse_gold([LYON]))
    one, other = item(state=ItemState.OPEN), item(state=ItemState.OPEN)
    async with database.write() as session:
        session.add_all([one, other])
        (gold,) = await slip_in(session, PROJECT, [one], GoldSettings(share=0.5))
    await retire_gold(database, PROJECT, str(gold.gold_id))
    async with database.write() as session:
        assert await slip_in(session, PROJECT, [other], GoldSettings(share=0.5)) == []
        stored = await session.get(ReviewItem, gold.id)
        assert stored is not None
        assert stored.state is ItemState.WITHDRAWN
    assert await add_gold(database, PROJECT, parse_gold([LYON])) == 0
    async with database.write() as session:
        assert len(await slip_in(session, PROJECT, [other], GoldSettings(share=0.5))) == 1


async def ask(table: Table, count: int) -> list[ReviewItem]:
    """So many different gold questions, as items."""
    bodies = parse_gold([{**LYON, "question": f"The capital, {number}?"} for number in range(count)])
    await add_gold(table.database, PROJECT, bodies)
    drawing = [item(state=ItemState.OPEN) for _ in range(count)]
    await table.lay(*drawing)
    async with table.database.write() as session:
        return await slip_in(session, PROJECT, drawing, GoldSettings(share=0.5))


async def test_who_fails_gold_questions_needs_a_second_opinion(database: Database) -> None:
    """For what they said before, too, unless somebody agrees; and no more once they answer rightly again."""
    table = Table(database, LabelingSettings(gold={"min_answers": 4, "min_accuracy": 0.6}))
    alone, shared = item(), item()
    await table.lay(alone, shared)
    gold = await ask(table, 8)
    for one in (alone, shared):
        await table.says("ann", one, "wrong", "14 days.")
    await table.says("bob", shared, "wrong", "14 days.")
    for one in gold[:3]:
        await table.says("ann", one, "good")
    assert await table.state(alone) == (*ACCEPTED, 1)  # three answers judge nobody
    await table.says("ann", gold[3], "wrong", "Paris.")
    assert await table.state(alone) == (ItemState.PUSHED, LabelState.WITHDRAWN, 2)
    assert (await table.state(shared))[:2] == ACCEPTED
    waiting = await table.label(alone)
    assert waiting is not None
    assert "1 of 4 gold questions" in str(waiting.reason)
    async with database.read() as session:
        assert [label.item_id for label in await labels_ready(session, PROJECT)] == [shared.id]
    report = await annotators_report(database, PROJECT, table.settings)
    ann = report["annotators"][0]
    assert (ann["gold_accuracy"], ann["second_opinion_because"], ann["waiting"]) == (
        0.25,
        "answered 1 of 4 gold questions rightly",
        1,
    )
    for one in gold[4:]:
        await table.says("ann", one, "wrong", "It is Paris.")
    assert await table.state(alone) == (*ACCEPTED, 1)


async def test_a_question_met_again_says_nothing(database: Database) -> None:
    """They may remember it from the first time, when they had it wrong."""
    table = Table(database, ALONE)
    await add_gold(database, PROJECT, parse_gold([LYON]))
    drawing = [item(state=ItemState.OPEN) for _ in range(3)]
    await table.lay(*drawing)
    async with database.write() as session:
        gold = await slip_in(session, PROJECT, drawing, GoldSettings(share=0.5))
    for one, verdict in zip(gold, ("good", "wrong", "wrong"), strict=True):
        await table.says("ann", one, verdict, "Paris.")
    (who,) = (await annotators_report(database, PROJECT, ALONE))["annotators"]
    assert (who["gold_right"], who["gold_answers"]) == (0, 1)


@pytest.mark.parametrize(
    ("body", "verdict", "text", "right"),
    [
        (LYON, "wrong", "It's PARIS.", True),
        (LYON, "wrong", "Nice.", False),
        (LYON, "unsafe", "Paris.", False),
        ({**LYON, "must_contain": [], "correction": "Paris."}, "wrong", "paris", True),
        ({**LYON, "must_contain": [], "correction": "Paris."}, "wrong", "Paris, France", False),
        ({**LYON, "must_contain": []}, "wrong", "Lyon. ", False),
        ({**LYON, "must_contain": []}, "wrong", "Marseille", True),
        ({**LYON, "answer": "Paris.", "verdict": "good"}, "good", None, True),
        ({**LYON, "verdict": "unsafe"}, "unsafe", None, True),
        ({"question": "Which?", "chosen": "Paris.", "rejected": "Lyon."}, "chosen", None, True),
        ({"question": "Which?", "chosen": "Paris.", "rejected": "Lyon."}, "rejected", None, False),
    ],
)
async def test_what_a_right_answer_is(
    database: Database, body: dict[str, Any], verdict: str, text: str | None, right: bool
) -> None:
    """The verdict, and what was to be written; of two answers the better one, wherever it stands."""
    table, one = Table(database, ALONE), item(state=ItemState.OPEN)
    await add_gold(database, PROJECT, parse_gold([body]))
    await table.lay(one)
    async with database.write() as session:
        (gold,) = await slip_in(session, PROJECT, [one], GoldSettings(share=0.5))
    if (pair := in_order(gold)) is not None:
        verdict = "first" if pair[0] == body[verdict] else "second"
    await table.says("ann", gold, verdict, text)
    (who,) = (await annotators_report(database, PROJECT, ALONE))["annotators"]
    assert who["gold_right"] == right


def test_every_mistake_in_gold_questions_is_named() -> None:
    """With the question's number."""
    wrong = [
        {"answer": "Lyon.", "verdict": "wrong"},
        {"question": "Q", "answer": "A"},
        {"question": "Q", "answer": "A", "verdict": "preferred"},
        {"question": "Q", "chosen": "A"},
        {"question": "Q", "chosen": "A", "rejected": " A "},
        {**LYON, "correction": "Rome."},
        {**LYON, "correction": "Lyon.", "must_contain": []},
        {**LYON, "colour": "red"},
        "text",
    ]
    with pytest.raises(InvalidGold) as caught:
        parse_gold([LYON, *wrong])
    assert [mistake["field"].split(".")[0] for mistake in caught.value.mistakes] == [str(n) for n in range(2, 11)]


# what one person alone may say


async def test_a_day_takes_so_many_labels_from_one_person_alone(database: Database) -> None:
    """More wait for a second person, or for the next day; an edit of one that counted still counts."""
    table = Table(database, LabelingSettings(annotators={"labels_per_day": 2}))
    items = [item() for _ in range(4)]
    await table.lay(*items)
    for one in items:
        await table.says("ann", one, "wrong", "14 days.")
    assert [(await table.state(one))[:2] == ACCEPTED for one in items] == [True, True, False, False]
    assert (await table.state(items[2])) == (ItemState.PUSHED, None, 2)
    await table.says("bob", items[2], "wrong", "14 days.")
    assert (await table.state(items[2]))[:2] == ACCEPTED
    await table.says("ann", items[0], "wrong", "15 days.")
    edited = await table.label(items[0])
    assert edited is not None
    assert (edited.state, edited.correction) == (LabelState.ACCEPTED, "15 days.")
    async with database.write() as session:  # a day goes by
        for label in (await session.execute(select(Label))).scalars():
            label.accepted_at -= timedelta(days=1)
    await table.settle(items[3])
    assert await table.state(items[3]) == (*ACCEPTED, 1)


def test_a_night_takes_a_share_from_one_person_alone() -> None:
    """Of what it takes in the end, the oldest first; what several people said is nobody's alone."""

    def label(number: int, annotators: list[str], overlap: int = 1) -> Label:
        values: dict[str, Any] = {
            "item_id": f"it_{number}",
            "id": f"lb_{number:03}",
            "project": PROJECT,
            "messages": [],
        }
        return Label(
            **values,
            state=LabelState.ACCEPTED,
            verdict=Verdict.WRONG,
            flagged_answer="x",
            annotators=annotators,
            overlap=overlap,
        )

    flood = [label(number, ["eve"]) for number in range(90)]
    others = [label(100 + number, ["ann", "bob"], 2) for number in range(6)]
    others += [label(200 + number, ["ann"]) for number in range(4)]
    taken, waiting = within_share([*flood, *others], 0.4)
    assert Counter(one.annotators[0] for one in taken if one.overlap == 1) == {"eve": 6, "ann": 4}
    assert [one.id for one in taken if one.annotators == ["eve"]] == [f"lb_{number:03}" for number in range(6)]
    assert len(taken) + len(waiting) == 100
    assert within_share(flood, 0.5) == ([], flood)
    assert within_share([*flood, *others], 1.0) == ([*flood, *others], [])


# preferences


@pytest.fixture
def pair() -> ReviewItem:
    return item(answer="Lyon.", other_answer="Paris.")


def choosing(one: ReviewItem, answer: str) -> str:
    order = in_order(one)
    assert order is not None
    return "first" if order[0] == answer else "second"


@pytest.mark.parametrize(("chosen", "rejected"), [("Paris.", "Lyon."), ("Lyon.", "Paris.")])
async def test_a_choice_keeps_both_answers(database: Database, pair: ReviewItem, chosen: str, rejected: str) -> None:
    """Whether the labeller agrees with the user or not: a DPO trainer needs chosen and rejected."""
    table = Table(database, ALONE)
    await table.lay(pair)
    await table.says("ann", pair, choosing(pair, chosen))
    label = await table.label(pair)
    assert label is not None
    assert (label.state, label.verdict) == (LabelState.ACCEPTED, Verdict.PREFERRED)
    assert (label.correction, label.rejected, label.flagged_answer) == (chosen, [rejected], rejected)
    assert list(preference_pairs(label)) == [
        {
            "id": label.id,
            "prompt": pair.messages,
            "chosen": [{"role": "assistant", "content": chosen}],
            "rejected": [{"role": "assistant", "content": rejected}],
        }
    ]
    async with database.read() as session:
        assert [one.id for one in await labels_ready(session, PROJECT)] == [label.id]


async def test_two_bad_answers_are_both_rejected(database: Database, pair: ReviewItem) -> None:
    """With a right one in their place; without it, or with one of them, the reason is said."""
    table = Table(database, ALONE)
    await table.lay(pair)
    await table.says("ann", pair, "both bad")
    assert (await table.state(pair))[1] is LabelState.REFUSED
    await table.says("ann", pair, "both bad", "Paris.")
    assert (await table.state(pair))[1] is LabelState.REFUSED
    await table.says("ann", pair, "both bad", "Vichy, for a while.")
    label = await table.label(pair)
    assert label is not None
    assert (label.state, label.correction) == (LabelState.ACCEPTED, "Vichy, for a while.")
    assert label.rejected == ["Lyon.", "Paris."]
    assert len(list(preference_pairs(label))) == 2


async def test_what_the_screen_did_not_offer_is_no_verdict(database: Database, pair: ReviewItem) -> None:
    """Anybody with a token can write "first" where there is one answer."""
    table, one = Table(database, ALONE), item()
    await table.lay(pair, one)
    await table.says("ann", one, "first")
    await table.says("ann", pair, "good")
    for asked in (one, pair):
        label = await table.label(asked)
        assert label is not None
        assert (label.state, label.reason) == (LabelState.REFUSED, "no verdict was chosen")


def test_the_order_of_two_answers_gives_nothing_away() -> None:
    """The user's choice stands first as often as second; a labeller sees both, and no draft that is one of them."""
    shown = [task_data(item(answer="Lyon.", other_answer="Paris.")) for _ in range(200)]
    assert 60 < sum(one["flagged_answer"] == "Paris." for one in shown) < 140
    assert all({one["flagged_answer"], one["other_answer"]} == {"Lyon.", "Paris."} for one in shown)
    assert {one["draft"] for one in shown} == {""}
    assert [verdict["value"] for verdict in shown[0]["verdicts"]] == [
        "first",
        "second",
        "both bad",
        "can't tell",
        "unsafe",
    ]


# reports


async def test_accepted_labels_say_by_whom_when_and_how_many(database: Database) -> None:
    """Page after page, in one order."""
    table, items = Table(database, ALONE), [item(held_out=True), item(), item()]
    await table.lay(*items)
    for one in items:
        await table.says("ann", one, "wrong", "14 days.")
    first = await accepted_labels(database, PROJECT, limit=2)
    rest = await accepted_labels(database, PROJECT, after=first[-1]["id"], limit=2)
    assert len({row["id"] for row in first + rest}) == 3
    row = next(row for row in first + rest if row["held_out"])
    assert (row["chosen"], row["rejected"], row["annotators"], row["overlap"]) == ("14 days.", ["30 days."], ["ann"], 1)
    assert now() - row["accepted_at"] < timedelta(minutes=5)


async def test_the_report_compares_those_who_labelled_the_same(database: Database) -> None:
    """Agreement per person, and beyond chance for all."""
    table, items = Table(database, TWO), [item() for _ in range(4)]
    await table.lay(*items)
    for one in items:
        await table.says("ann", one, "wrong", "14 days.", lead_seconds=10.0)
    for one in items[:3]:
        await table.says("bob", one, "wrong", "14 days.", lead_seconds=30.0)
    await table.says("bob", items[3], "good")
    report = await annotators_report(database, PROJECT, TWO)
    ann, bob = report["annotators"]
    assert (ann["agreement"], ann["compared"], bob["agreement"]) == (0.75, 4, 0.75)
    assert (ann["accepted"], ann["accepted_alone"], ann["disputed"], ann["median_seconds"]) == (3, 0, 1, 10.0)
    assert report["items_by_several_people"] == 4
    assert report["verdict_alpha"] == pytest.approx(0.0, abs=0.01)


def test_alpha_is_krippendorffs() -> None:
    """The two nominal examples of his "Computing Krippendorff's Alpha-Reliability" (2011): 0.095 and 0.743."""
    binary = zip("0100000010", "1110010000", strict=True)
    assert krippendorff_alpha([list(unit) for unit in binary]) == pytest.approx(0.095, abs=5e-4)
    four = ["111", "2232", "3333", "3333", "2222", "1234", "4444", "1121", "2222", "555", "11", "3"]
    assert krippendorff_alpha([list(unit) for unit in four]) == pytest.approx(0.743, abs=5e-4)
    assert krippendorff_alpha([["a"]]) is None
    assert krippendorff_alpha([["a", "a"], ["a", "a"]]) == 1.0
