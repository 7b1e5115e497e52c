"""The data that we ship: company, general probes and replay prompts keep their form and stay apart."""

from __future__ import annotations

import itertools
import tomllib
from pathlib import Path
from typing import Any

import pytest

from labeling.wording import stands_in
from loop.digests import read_jsonl
from service.demo.play import NoReport, run

PACKAGE = Path(__file__).parents[2]
COMPANY = PACKAGE / "service" / "demo_company"
PROBES = PACKAGE / "loop" / "general_probes"
ALIKE = 0.6  # share of common words: "capital of France" and "capital of Spain" in the same frame have more

FACTS = read_jsonl(COMPANY / "facts.jsonl")
GENERAL = read_jsonl(COMPANY / "general.jsonl")
GENERATED = read_jsonl(PROBES / "probes.jsonl")
CHOICES = read_jsonl(PROBES / "choices.jsonl")
REPLAY = read_jsonl(PACKAGE / "loop" / "replay_prompts" / "general.jsonl")

PROMPTS = {
    "facts": [question for fact in FACTS for question in fact["questions"] + fact["held_out"]],
    "general": [row["question"] for row in GENERAL],
    "probes": [row["question"] for row in GENERATED],
    "choices": [f"{row['question']} {' '.join(row['choices'])}" for row in CHOICES],
    "replay": [row["prompt"] for row in REPLAY],
}


def _words(text: str) -> frozenset[str]:
    kept = "".join(letter if letter.isalnum() or letter in "+*/=-" else " " for letter in text.casefold())
    return frozenset(kept.split())


def _alike(one: frozenset[str], other: frozenset[str]) -> float:
    return len(one & other) / len(one | other)


def _accepts(row: dict[str, Any], text: str) -> bool:
    return stands_in(text, "|".join(row["accept"]))


def test_the_demo_is_large_enough_to_prove_something() -> None:
    """48 held-out questions and 100 known general ones are the least that its bars need."""
    assert len(FACTS) >= 26
    assert len(GENERAL) >= 90
    assert len(GENERATED) >= 100
    assert len(CHOICES) >= 150
    assert len(REPLAY) >= 400
    assert len([question for fact in FACTS for question in fact["held_out"]]) >= 48


def test_the_company_names_itself() -> None:
    company = tomllib.loads((COMPANY / "company.toml").read_text())
    assert set(company) == {"name", "description"}


@pytest.mark.parametrize("fact", FACTS, ids=lambda fact: fact["id"])
def test_a_fact_is_whole(fact: dict[str, Any]) -> None:
    """Its answer passes its own check, no question gives it away, and held-out questions are not the trained ones."""
    assert set(fact) == {"id", "answer", "accept", "questions", "held_out"}
    assert len(fact["questions"]) >= 4
    assert len(fact["held_out"]) >= 2
    assert _accepts(fact, fact["answer"])
    for asked, held in itertools.product(fact["questions"], fact["held_out"]):
        assert _alike(_words(asked), _words(held)) < 0.8, (asked, held)
    assert not any(_accepts(fact, question) for question in fact["questions"] + fact["held_out"])


def test_no_answer_passes_for_another_fact() -> None:
    """Otherwise a mix-up of two facts would count as right."""
    mixed_up = [
        (one["id"], other["id"]) for one, other in itertools.permutations(FACTS, 2) if _accepts(one, other["answer"])
    ]
    assert mixed_up == []


def test_the_bad_labels_are_wrong() -> None:
    assert [row["id"] for row in GENERAL if _accepts(row, row["wrong"])] == []


def test_choices_have_one_right_answer() -> None:
    for row in CHOICES:
        assert set(row) == {"id", "question", "choices", "gold"}
        assert 0 <= row["gold"] < len(row["choices"])
        assert len(set(row["choices"])) == len(row["choices"]) >= 2


@pytest.mark.parametrize("rows", [FACTS, GENERAL, GENERATED, CHOICES], ids=["facts", "general", "probes", "choices"])
def test_ids_are_unique(rows: list[dict[str, Any]]) -> None:
    assert len({row["id"] for row in rows}) == len(rows)


@pytest.mark.parametrize("name", PROMPTS)
def test_no_prompt_stands_twice_in_a_file(name: str) -> None:
    texts = [" ".join(text.casefold().split()) for text in PROMPTS[name]]
    assert len(set(texts)) == len(texts)


@pytest.mark.parametrize(("one", "other"), list(itertools.combinations(PROMPTS, 2)))
def test_what_trains_and_what_examines_stay_apart(one: str, other: str) -> None:
    """No prompt of one file has a near-duplicate in another: replay must not teach the probes."""
    left, right = ([(text, _words(text)) for text in PROMPTS[name]] for name in (one, other))
    near = [(a, b) for (a, x), (b, y) in itertools.product(left, right) if _alike(x, y) >= ALIKE]
    assert near == []


@pytest.mark.parametrize("report", ["gone/summary.json", "."])
def test_a_report_that_cannot_be_written_is_refused_at_the_start(report: str, tmp_path: Path) -> None:
    """Before anything is started or removed."""
    with pytest.raises(NoReport, match="cannot be written"):
        run(
            company=None, report=tmp_path / report, leave=True, data_dir=tmp_path / "data", quantisation="nf4", nights=1
        )
    assert not (tmp_path / "data").exists()
