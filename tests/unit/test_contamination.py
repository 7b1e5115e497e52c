"""The exam stays unseen: what leaks is left out and named, what does not is kept."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from labeling.near_duplicates import NearDuplicates
from loop.contamination import clean, suite_items
from loop.digests import read_jsonl
from loop.scoring import ExamItem
from loop.settings import GateSettings, TaskSettings

PACKAGE = Path(__file__).parents[2]


def row(name: str, question: str) -> dict[str, object]:
    messages = [{"role": "user", "content": question}, {"role": "assistant", "content": "x"}]
    return {"id": name, "messages": messages, "kind": "label"}


def item(name: str, question: str) -> ExamItem:
    return ExamItem(id=name, messages=[{"role": "user", "content": question}])


def test_a_held_out_prompt_leaks_only_when_identical() -> None:
    """Case and punctuation don't hide it; a paraphrase is what the held-out part is for."""
    held_out = [item("h1", "Who founded Quillmere?")]
    cleaned = clean([row("a", "who founded quillmere"), row("b", "Who founded the Quillmere?")], held_out, [])
    assert [kept["id"] for kept in cleaned.kept] == ["b"]
    assert cleaned.dropped == ("a left out of training: its prompt is that of held-out item h1",)


@pytest.mark.parametrize(
    ("question", "leaks"),
    [
        ("What is the capital city of Portugal?", True),
        ("what's the capital city of portugal", True),
        ("Please: what is the capital city of Portugal?", True),
        ("What is the capital city of Spain?", False),
        ("How long is the warranty?", False),
        ("what IS 3 plus 4", True),
        ("What is 3 plus 5?", False),
    ],
)
def test_elsewhere_near_duplicates_leak_too(question: str, leaks: bool) -> None:
    """Another question of the same form is not a leak: it shares the words, not the answer."""
    cleaned = clean(
        [row("a", question)],
        [],
        [item("p1", "What is the capital city of Portugal?"), item("p1b", "What is 3 plus 4?")],
    )
    assert bool(cleaned.dropped) is leaks
    assert all("p1" in line for line in cleaned.dropped)


def test_the_answer_and_the_system_text_do_not_count() -> None:
    """Only what the user said makes two prompts alike."""
    system = {"role": "system", "content": "You are the very long system prompt of this support bot. " * 5}
    exam = ExamItem(id="p", messages=[system, {"role": "user", "content": "Where is the shop?"}])
    other = {"id": "a", "messages": [system, {"role": "user", "content": "How do I clean a pen?"}]}
    same = {"id": "b", "messages": [{"role": "user", "content": "Where is the shop?"}]}
    assert [kept["id"] for kept in clean([other, same], [], [exam]).kept] == ["a"]


def test_our_replay_prompts_are_clear_of_our_probes() -> None:
    """What holds the model in place must not be what measures it."""
    gate = GateSettings()
    replay = read_jsonl(PACKAGE / "loop" / "replay_prompts" / "general.jsonl")
    probes = suite_items(gate)
    assert len(probes) >= 250
    cleaned = clean([row(str(n), line["prompt"]) for n, line in enumerate(replay)], [], probes)
    assert cleaned.dropped == ()


def test_the_projects_own_tasks_are_guarded(tmp_path: Path) -> None:
    """Any JSONL row with a question in a task's folder is an exam item."""
    (tmp_path / "data.jsonl").write_text(json.dumps({"id": "q", "question": "Which bus goes to the harbour?"}) + "\n")
    gate = GateSettings(general_probes=False, tasks=(TaskSettings(name="mine", folder=tmp_path),))
    assert clean([row("a", "Which bus goes to the harbour?")], [], suite_items(gate)).kept == []


def test_the_index_finds_what_it_should_among_many() -> None:
    """One thousand texts, one changed letter: found; and the exact similarity is reported."""
    index: NearDuplicates[int] = NearDuplicates()
    for number in range(1000):
        index.add(number, f"Question number {number * 7919} about the {number}th item of the catalogue")
    found = index.find("Question number 3959500 about the 500th item of the catalogue!!")
    assert found == (500, 1.0)
    assert index.find("Something else entirely") is None
