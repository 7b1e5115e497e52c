"""From annotations to one outcome, without any database or server."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from itertools import combinations_with_replacement, permutations
from random import Random
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from labeling.agreement import Outcome, agree
from labeling.labeling_screen import OFFERED, Opinion, as_result, read_result, task_data
from labeling.tables import Annotation, LabelState, ReviewItem, Verdict
from labeling.wording import same_wording, stands_in

FLAGGED = "The capital is Lyon."


def said(annotator: str, verdict: str | None, correction: str | None = None, **values: Any) -> Annotation:
    number = values.pop("number", sum(annotator.encode()))
    at = datetime(2026, 1, 1, tzinfo=UTC) + timedelta(seconds=number)
    row = Annotation(
        labelling_project=1, annotation_id=number, item_id="it_1", annotator=annotator, updated_at=at, **values
    )
    row.verdict, row.correction = verdict, correction
    return row


def outcome(*annotations: Annotation, people: int = 1) -> Outcome:
    found = agree(FLAGGED, annotations, people)
    assert found is not None
    return found


def test_one_correction_is_enough_where_one_person_is() -> None:
    """The default of annotations_per_item."""
    found = outcome(said("ann", "wrong", "Paris.", must_contain=["Paris"]))
    assert found == Outcome(LabelState.ACCEPTED, Verdict.WRONG, ("ann",), "Paris.", ("Paris",))


@pytest.mark.parametrize("values", [{"cancelled": True}, {"deleted": True}])
def test_skipped_and_deleted_annotations_say_nothing(values: dict[str, Any]) -> None:
    """Neither as an opinion nor against one."""
    assert agree(FLAGGED, [said("ann", "wrong", "Paris.", **values)], 1) is None
    assert outcome(said("ann", "good", **values), said("bob", "wrong", "Paris.")).annotators == ("bob",)


def test_one_person_counts_once() -> None:
    """The free edition lets one person annotate a task twice: the last one is what they mean."""
    twice = [said("ann", "wrong", "Nice.", number=1), said("ann", "wrong", "Paris.", number=2)]
    assert agree(FLAGGED, twice, 2) is None
    assert outcome(*reversed(twice)).correction == "Paris."


def test_two_agree_whatever_the_white_space() -> None:
    """But not whatever the words, the case or the punctuation."""
    assert outcome(
        said("ann", "wrong", "Paris, France."), said("bob", "wrong", " Paris,\nFrance. "), people=2
    ).correction
    for other in ("Paris, France", "paris, France.", "Paris."):
        found = outcome(said("ann", "wrong", "Paris, France."), said("bob", "wrong", other), people=2)
        assert found.state is LabelState.DISPUTED


def test_a_dispute_says_who_said_what() -> None:
    """It is settled by talking to them, or by a third person."""
    ann, bob = said("ann", "wrong", "Paris."), said("bob", "good", FLAGGED)
    found = outcome(ann, bob, people=2)
    assert (found.state, found.correction) == (LabelState.DISPUTED, None)
    assert all(part in str(found.reason) for part in ("ann: wrong", "Paris.", "bob: good"))
    settled = outcome(ann, bob, said("cid", "wrong", "Paris."), people=2)
    assert (settled.state, settled.correction, len(settled.annotators)) == (LabelState.ACCEPTED, "Paris.", 3)
    assert outcome(ann, bob, said("cid", "unsafe"), people=2).state is LabelState.DISPUTED


def test_the_untouched_draft_below_another_verdict_means_nothing() -> None:
    """The box is prefilled, so it comes along with every verdict."""
    found = outcome(said("ann", "good", FLAGGED), said("bob", "good", None), people=2)
    assert (found.state, found.verdict, found.correction) == (LabelState.ACCEPTED, Verdict.GOOD, None)
    found = outcome(said("ann", "can't tell", "A user's idea."))
    assert (found.state, found.correction) == (LabelState.ACCEPTED, None)
    found = outcome(said("ann", "unsafe", f" {FLAGGED} "))
    assert (found.state, found.correction) == (LabelState.ACCEPTED, None)
    assert outcome(said("ann", "unsafe", "I can't help with that.")).correction == "I can't help with that."


@pytest.mark.parametrize(
    ("annotation", "reason"),
    [
        (said("ann", "wrong", None), "empty"),
        (said("ann", "wrong", " \n "), "empty"),
        (said("ann", "wrong", "The  capital is Lyon.\n"), "unchanged"),
        (said("ann", None, "Paris."), "no verdict"),
        (said("ann", "wrong", "Paris.", must_contain=["Paris", "the capital|main city"]), "the capital|main city"),
        (said("ann", "unsafe", "No.", must_contain=["sorry"]), "sorry"),
        (said("ann", "good", None, must_contain=["Paris"]), "Paris"),
    ],
)
def test_what_can_not_be_trained_on_is_refused_with_its_reason(annotation: Annotation, reason: str) -> None:
    """The reason is all that the labeller will see."""
    found = outcome(annotation)
    assert found.state is LabelState.REFUSED
    assert reason in str(found.reason)


def test_a_correction_of_case_alone_is_one() -> None:
    """ "iPhone" for "Iphone" is what some labels are about."""
    assert outcome(said("ann", "wrong", FLAGGED.upper())).state is LabelState.ACCEPTED


def test_two_who_word_it_differently_agree_by_the_words_that_count() -> None:
    """Nobody words a long answer as another does; `must_contain` says what an answer is about."""
    ann = said("ann", "wrong", "It is Paris, the capital.", must_contain=["Paris"])
    found = outcome(ann, said("bob", "wrong", "Paris it is."), people=2)
    assert (found.state, found.overlap) == (LabelState.ACCEPTED, 2)
    assert outcome(ann, said("bob", "wrong", "Lyon it is."), people=2).state is LabelState.DISPUTED
    assert outcome(ann, said("bob", "unsafe", "Paris it is."), people=2).state is LabelState.DISPUTED


def test_the_words_of_all_who_agree_count() -> None:
    """Each may have thought of another one."""
    found = outcome(
        said("ann", "wrong", "Paris, of course.", must_contain=["Paris"]),
        said("bob", "wrong", "Paris, of course.", must_contain=["of course", "Paris"]),
        people=2,
    )
    assert sorted(found.must_contain) == ["Paris", "of course"]


def test_who_agrees_with_both_speaks_for_both() -> None:
    """Ann and Cid each ask for a word that the other lacks; Bob says both, whenever he does."""
    ann = said("ann", "wrong", "Paris.", must_contain=["Paris"], number=1)
    cid = said("cid", "wrong", "In France.", must_contain=["France"], number=3)
    for when in (0, 2, 4):
        found = outcome(ann, said("bob", "wrong", "Paris, in France.", number=when), cid, people=2)
        assert (found.state, found.correction, found.overlap) == (LabelState.ACCEPTED, "Paris, in France.", 3)
        assert set(found.must_contain) == {"Paris", "France"}


def test_the_last_wording_of_those_who_agree_is_taken() -> None:
    """Who annotates again speaks last."""
    first = said("ann", "wrong", "Paris it was.", must_contain=["Paris"], number=1)
    again = said("ann", "wrong", "Paris it is.", must_contain=["Paris"], number=3)
    bob = said("bob", "wrong", "It's Paris.", number=2)
    assert outcome(first, bob, people=2).correction == "It's Paris."
    assert outcome(first, again, bob, people=2).correction == "Paris it is."


def test_of_two_ways_to_agree_the_one_that_can_be_trained_on_counts() -> None:
    """Three agree with Bob, who said word for word what Ann did, without the word that she asks for; three with Cid."""
    people = [
        said("ann", "wrong", "Paris, France.", must_contain=["Lyon"]),
        said("bob", "wrong", "Paris, France."),
        said("cid", "wrong", "Paris.", must_contain=["Paris"]),
        said("dan", "wrong", "Paris, Europe."),
    ]
    for days, last in enumerate(people, start=1):
        last.updated_at += timedelta(days=days)
        found = outcome(*people, people=2)
        assert (found.state, found.correction, found.overlap) == (LabelState.ACCEPTED, "Paris.", 3), last.annotator


def test_one_number_in_two_projects_is_two_annotations() -> None:
    """Label Studio's project was made again and counts from its start; of one moment, the later project's is taken."""
    old = said("ann", "wrong", "Nice.", number=1)
    new = said("ann", "wrong", "Paris.", number=1)
    new.labelling_project = 2
    assert outcome(old, new).correction == outcome(new, old).correction == "Paris."


TEXTS = ("Paris", "France", "Paris France", "Paris France Lyon", "Lyon")
ASKED: tuple[list[str], ...] = ([], [], ["Paris"], ["France"], ["Lyon"])


@st.composite
def annotated(draw: st.DrawFn) -> list[Annotation]:
    """Few people, texts, words and moments, so that they often agree by half, tie, or say two things at one moment."""
    keys = draw(st.lists(st.tuples(st.sampled_from([1, 2]), st.integers(-1, 3)), unique=True, min_size=3, max_size=7))
    return [
        Annotation(
            labelling_project=project,
            annotation_id=number,
            item_id="it_1",
            annotator=draw(st.sampled_from(["ann", "bob", "cid", "dan"])),
            verdict=draw(st.sampled_from(["wrong"] * 6 + ["good", "unsafe", None])),
            correction=draw(st.sampled_from(TEXTS)),
            must_contain=draw(st.sampled_from(ASKED)),
            cancelled=draw(st.sampled_from([False] * 6 + [True])),
            updated_at=datetime(2026, 1, 1, tzinfo=UTC) + timedelta(seconds=draw(st.integers(0, 2))),
        )
        for project, number in keys
    ]


@given(annotated(), st.integers(1, 3), st.randoms(use_true_random=False))
def test_the_order_of_annotations_changes_nothing(opinions: list[Annotation], people: int, dice: Random) -> None:
    """Databases return rows in any order, also two of one moment, or with one number in two projects."""
    shuffled = dice.sample(opinions, len(opinions))
    assert agree("Lyon", shuffled, people) == agree("Lyon", opinions, people)


def test_who_spoke_first_does_not_decide() -> None:
    """Whatever three people say, only the wording that is taken may change with the order in which they spoke."""
    opinions: list[tuple[str, str, list[str]]] = [("wrong", text, asked) for text in TEXTS for asked in ASKED[1:]]
    opinions += [("good", FLAGGED, []), ("unsafe", "Paris", ["Paris"])]
    for three in combinations_with_replacement(opinions, 3):
        seen = set()
        for order in permutations((1, 2, 3)):
            rows = [
                said(who, verdict, text, must_contain=asked, number=at)
                for who, (verdict, text, asked), at in zip(("ann", "bob", "cid"), three, order, strict=True)
            ]
            found = outcome(*rows, people=2)
            verdict = None if found.state is LabelState.DISPUTED else found.verdict
            seen.add((found.state, found.annotators, found.overlap, verdict))
        assert len(seen) == 1, (three, seen)


@pytest.mark.parametrize(
    ("text", "wanted", "found"),
    [
        ("It takes 14 days.", "14 days|two weeks", True),
        ("It takes TWO  weeks.", "14 days|two weeks", True),
        ("Page 15.", "5", False),
        ("3.5 kg", "5", False),
        ("Don’t", "don't", True),
        ("ﬁne", "fine", True),
        ("anything", "|", False),
        ("C++ or C", "c++", True),
    ],
)
def test_words_are_found_as_whole_words(text: str, wanted: str, found: bool) -> None:
    """A number inside another is not that number."""
    assert stands_in(text, wanted) is found


@given(st.text(), st.text())
def test_wording_is_compared_both_ways_alike(one: str, other: str) -> None:
    """And never raises, whatever was written."""
    assert same_wording(one, other) == same_wording(other, one)
    assert same_wording(one, f"\n {one}\t")
    stands_in(one, other)


opinions = st.builds(
    Opinion,
    st.sampled_from([*sorted(OFFERED), None]),
    st.one_of(st.none(), st.text(min_size=1).map(str.strip).filter(bool)),
    st.lists(st.from_regex(r"[a-z|]{1,9}", fullmatch=True), unique=True).map(tuple),
)


@given(opinions)
def test_an_opinion_comes_back_as_it_was_written(opinion: Opinion) -> None:
    """The demo's labellers and the tests write what the screen would."""
    assert read_result(as_result(opinion)) == opinion


anything: st.SearchStrategy[Any] = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.sampled_from(["choices", "text", "value", "from_name"]), inner),
)
parts = st.fixed_dictionaries(
    {"from_name": st.sampled_from(["verdict", "correction", "must_contain"]), "value": anything}
)


@given(st.lists(parts | anything))
def test_no_result_breaks_the_reader(result: list[Any]) -> None:
    """Anybody with a token can write anything; one such annotation must not stop the others."""
    read = read_result(result)
    assert read.verdict is None or read.verdict in OFFERED


def test_entries_of_one_box_are_one_text() -> None:
    """The box of words takes several entries; a person may also have pressed Enter in mid-answer."""
    result = as_result(Opinion("wrong", "Paris."))
    result += [{"from_name": "must_contain", "value": {"text": ["Paris\n\n city ", "France"]}}]
    assert read_result(result).must_contain == ("Paris", "city", "France")


@pytest.mark.parametrize(
    ("item", "why"),
    [
        ({"count": 1}, "Flagged once."),
        (
            {"count": 7, "reasons": ["wrong", "old"], "served": "bot@v3"},
            "Flagged 7 times: wrong, old. Answered by bot@v3.",
        ),
        (
            {"count": 1, "other_answer": "b"},
            "Reported once. A user preferred one of two answers; say which is better.",
        ),
    ],
)
def test_the_labeller_reads_why_it_was_flagged(item: dict[str, Any], why: str) -> None:
    """And how often."""
    row = ReviewItem(project="p", prompt_digest="d", messages=[], answer="a", **item)
    assert task_data(row)["why"] == why


def test_the_draft_is_the_users_correction_where_there_is_one() -> None:
    """Otherwise the flagged answer; the labeller is told whose it is."""
    row = ReviewItem(project="p", prompt_digest="d", messages=[], answer="Lyon", prefilled="Paris", count=1)
    assert (task_data(row)["draft"], task_data(row)["flagged_answer"]) == ("Paris", "Lyon")
    assert "check it" in task_data(row)["why"]
    row.prefilled = None
    assert task_data(row)["draft"] == "Lyon"
