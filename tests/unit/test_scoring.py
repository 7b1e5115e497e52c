"""Scorers: right is right in any spelling a reader would accept, wrong is wrong, and a bad item is named."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from sacrebleu import sentence_chrf

from labeling.wording import stands_in
from loop.scoring import BadExamItem, BadHeldOutFile, ExamItem, chrf, held_out_items, score
from loop.settings import Scoring


def item(reference: str | None = None, *must_contain: str) -> ExamItem:
    return ExamItem(id="x", messages=[], reference=reference, must_contain=list(must_contain))


@pytest.mark.parametrize(
    ("answer", "wanted", "right"),
    [
        ("The capital is Lisbon.", "lisbon", True),
        ("LISBON!", "Lisbon.", True),
        ("Lisbonne", "Lisbon", False),
        ("It has 15 legs", "5", False),
        ("It weighs 3.5 kg", "5", False),
        ("It weighs 3.5 kg", "3.5", True),
        ("It costs 5.", "5", True),
        ("It costs 5,000 kr", "5", False),
        ("in Tromsø", "TROMSØ", True),
        ("Café au lait", "cafe\u0301", True),
        ("don’t know", "don't know", True),
        ("STRASSE", "straße", True),
        ("two of them", "2|two", True),
        ("three of them", "2|two", False),
        ("we use C++ here", "C++", True),
        ("anything", "", False),
        ("anything", " | ", False),
    ],
)
def test_contains_matches_whole_words_in_any_script(answer: str, wanted: str, right: bool) -> None:
    """Case, quotes and Unicode forms don't matter; word and number boundaries do."""
    assert stands_in(answer, wanted) is right


@pytest.mark.parametrize(
    ("scoring", "exam", "answer", "right"),
    [
        (Scoring.EXACT, item("Nora Vik."), "nora  vik", True),
        (Scoring.EXACT, item("Nora Vik."), "It was Nora Vik", False),
        (Scoring.CONTAINS, item("Nora Vik."), "It was Nora Vik, in 1998", True),
        (Scoring.CONTAINS, item("ignored", "7", "year|years"), "for 7 years", True),
        (Scoring.CONTAINS, item("ignored", "7", "year|years"), "for 7 months", False),
        (Scoring.REGEX, item(None, r"\b19\d\d\b"), "in 1998", True),
        (Scoring.REGEX, item(r"(in )?1998\.?"), "In 1998.", True),
        (Scoring.REGEX, item(r"1998"), "not 1998 at all", False),
        (Scoring.NUMERIC, item("It is 1,250.50 kr"), "1250.5", True),
        (Scoring.NUMERIC, item("The HL-200 has 7 years"), "7.0 years", True),
        (Scoring.NUMERIC, item("7"), "17", False),
        (Scoring.NUMERIC, item("-3 degrees"), "it is –3", True),
        (Scoring.NUMERIC, item("x", "4|6", "9"), "9 and 6", True),
        (Scoring.JSON_SCHEMA, item('{"name": "a", "tags": ["x"]}'), '{"name": "b", "tags": []}', True),
        (Scoring.JSON_SCHEMA, item('{"name": "a"}'), '{"name": 5}', False),
        (Scoring.JSON_SCHEMA, item('{"name": "a"}'), "no json", False),
        (Scoring.JSON_SCHEMA, item('{"$schema": "x", "type": "object", "required": ["a"]}'), '{"a": 1}', True),
        (Scoring.CHRF, item("The warranty is seven years"), "The warranty is seven years.", True),
        (Scoring.CHRF, item("The warranty is seven years"), "I like trains", False),
    ],
)
def test_each_scorer(scoring: Scoring, exam: ExamItem, answer: str, right: bool) -> None:
    """One right and one wrong answer at least for each."""
    assert score(exam, answer, scoring) == float(right)


@pytest.mark.parametrize("scoring", list(Scoring))
def test_an_empty_answer_is_never_right(scoring: Scoring) -> None:
    """Whatever the item asks."""
    assert score(item("", ".*"), "  \n", scoring) == 0.0


@pytest.mark.parametrize(
    ("scoring", "exam", "says"),
    [
        (Scoring.EXACT, item(), "no reference"),
        (Scoring.CONTAINS, item(), "no reference"),
        (Scoring.CHRF, item(), "no reference"),
        (Scoring.REGEX, item(None, "("), "bad regular expression"),
        (Scoring.NUMERIC, item("none"), "no number"),
        (Scoring.JSON_SCHEMA, item("not json"), "not JSON"),
        (Scoring.JSON_SCHEMA, item('{"$schema": "x", "type": 5}'), "schema is wrong"),
    ],
)
def test_an_item_that_cannot_be_scored_is_named(scoring: Scoring, exam: ExamItem, says: str) -> None:
    """A setting that doesn't fit the items is an error with the item's id, not a zero."""
    with pytest.raises(BadExamItem, match=says) as caught:
        score(exam, "an answer", scoring)
    assert "exam item x" in str(caught.value)


@pytest.mark.parametrize(
    ("answer", "reference"),
    [("the cat sat", "the cat sat on the mat"), ("Paris is it", "Paris"), ("blå bok", "en blå bok"), ("a", "ab")],
)
def test_chrf_is_sacrebleus(answer: str, reference: str) -> None:
    """Our own chrF needs no package in the service; it must give the reference implementation's number."""
    assert chrf(answer, reference) == pytest.approx(sentence_chrf(answer, [reference]).score / 100)


def test_held_out_rows_become_items(tmp_path: Path) -> None:
    """Any accepted text is enough."""
    path = tmp_path / "held_out.jsonl"
    path.write_text(json.dumps({"id": "q1", "question": "Capital of Portugal?", "accept": ["Lisbon", "Lisboa"]}) + "\n")
    (only,) = held_out_items(path)
    assert score(only, "It is Lisboa", Scoring.CONTAINS) == 1.0
    assert score(only, "It is Porto", Scoring.CONTAINS) == 0.0


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ('{"id": "a", "question": "q"}\n', "row 1: accept"),
        ('{"id": "a", "question": "q", "accept": []}\n', "row 1: accept"),
        ('{"id": "a", "question": "q", "accept": ["x"]}\n' * 2, "row 2: id 'a' stands there twice"),
        ("not json\n", "not JSON lines"),
        ("[]\n", "row 1"),
    ],
)
def test_a_bad_held_out_file_says_where(tmp_path: Path, text: str, says: str) -> None:
    """File, row and field are named."""
    path = tmp_path / "held_out.jsonl"
    path.write_text(text)
    with pytest.raises(BadHeldOutFile) as caught:
        held_out_items(path)
    assert says in str(caught.value)
    with pytest.raises(BadHeldOutFile, match="cannot read"):
        held_out_items(tmp_path / "nothing.jsonl")
