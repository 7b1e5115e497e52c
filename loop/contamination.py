"""Keeps training rows out of the exam: a model that has seen the exam proves nothing.

Exempt are the prompts trained on and examined again on purpose (family `trained`). In the held-out part only the
identical normalised prompt is a leak, since paraphrases are what it is for. Everywhere else near-duplicates leak too,
and replay prompts are held to it like labels.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from labeling.near_duplicates import NearDuplicates, normalised_prompt, repeated
from loop.digests import read_jsonl
from loop.scoring import ExamItem
from loop.settings import GateSettings

Row = dict[str, Any]
GENERAL_PROBES = Path(__file__).parent / "general_probes"
NEAR = 0.75  # of 3-letter shingles: "color" for "colour" leaks, "cat" for "dog" in the same frame does not


@dataclass(frozen=True)
class Cleaned:
    kept: list[Row]
    dropped: tuple[str, ...]  # one line each: which row, which exam item, why


def clean(rows: Sequence[Row], held_out: Iterable[ExamItem], others: Iterable[ExamItem]) -> Cleaned:
    """`rows` as the trainer gets them: {id, messages}, the last message being the answer."""
    identical = {_prompt(item.messages): item.id for item in held_out}
    exam = [(item.id, _prompt(item.messages)) for item in others]
    prompts = [_prompt(row["messages"]) for row in rows]
    near = _near(exam, prompts)
    kept: list[Row] = []
    dropped: list[str] = []
    for row, prompt in zip(rows, prompts, strict=True):
        leak = _leak(prompt, identical, near)
        if leak is None:
            kept.append(row)
        else:
            dropped.append(f"{row['id']} left out of training: {leak}")
    return Cleaned(kept, tuple(dropped))


def suite_items(gate: GateSettings) -> list[ExamItem]:
    """The questions of our general probes and of the project's own tasks, for `others`."""
    folders = [task.folder for task in gate.tasks]
    if gate.general_probes:
        folders.append(GENERAL_PROBES)
    return [
        ExamItem(id=f"{path.stem}/{row.get('id', number)}", messages=[{"role": "user", "content": row["question"]}])
        for folder in folders
        for path in sorted(folder.rglob("*.jsonl"))
        for number, row in enumerate(read_jsonl(path))
        if isinstance(row.get("question"), str)
    ]


def _near(exam: Sequence[tuple[str, str]], prompts: Sequence[str]) -> NearDuplicates[str]:
    """The exam items that have something alike, among themselves or in the prompts: mostly none."""
    near: NearDuplicates[str] = NearDuplicates(NEAR)
    alike = repeated([*(text for _, text in exam), *prompts])
    for (item, text), proposed in zip(exam, alike[: len(exam)], strict=True):
        if proposed:
            near.add(item, text)
    return near


def _leak(prompt: str, identical: dict[str, str], near: NearDuplicates[str]) -> str | None:
    if prompt in identical:
        return f"its prompt is that of held-out item {identical[prompt]}"
    found = near.find(prompt)
    return f"its prompt is {100 * found[1]:.0f} % that of exam item {found[0]}" if found else None


def _prompt(messages: Sequence[dict[str, Any]]) -> str:
    """All that a user said; the answer and a system text shared by every row say nothing of the question."""
    return normalised_prompt("\n".join(str(m.get("content")) for m in messages if m.get("role") == "user"))
