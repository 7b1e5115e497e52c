"""How much of what should be replaced is, and how much else: on labelled texts of ours, by kind.

A labelled value is found when every letter and digit of it is replaced under its own kind. A replaced place is right
when every letter and digit in it belongs to a labelled value of that kind. The bars hold for the texts that the
patterns were never tuned on; `detail` has every kind, tuned and held out apart.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from labeling.redaction.page import Kind, Span
from labeling.redaction.redactor import Redactor
from labeling.settings import RedactionSettings
from service.bench.figure import Figure, Say

TEXTS = Path(__file__).parent / "redaction_texts.jsonl"
PRECISION_BAR = 0.97
RECALL_BAR = 0.93


@dataclass(frozen=True)
class Labelled:
    id: str
    part: str  # tune or held_out
    text: str
    values: tuple[Span, ...]


@dataclass
class Tally:
    """Of one kind: labelled values and those found; replaced places and the right ones."""

    labelled: Counter[str] = field(default_factory=Counter)
    found: Counter[str] = field(default_factory=Counter)
    replaced: Counter[str] = field(default_factory=Counter)
    right: Counter[str] = field(default_factory=Counter)

    def recall(self, kinds: Iterable[str]) -> float:
        return _share(self.found, self.labelled, kinds)

    def precision(self, kinds: Iterable[str]) -> float:
        return _share(self.right, self.replaced, kinds)


def _share(part: Counter[str], whole: Counter[str], kinds: Iterable[str]) -> float:
    listed = list(kinds)
    total = sum(whole[kind] for kind in listed)
    return sum(part[kind] for kind in listed) / total if total else 1.0


def run(say: Say) -> list[Figure]:
    texts = load(TEXTS)
    tallies = {part: measure([text for text in texts if text.part == part], say) for part in ("tune", "held_out")}
    held, kinds = tallies["held_out"], [kind for kind in Kind if kind is not Kind.NAME]
    counts = f"{sum(text.part == 'held_out' for text in texts)} held-out texts"
    return [
        Figure("redaction_precision", held.precision(kinds), PRECISION_BAR, detail=f"{counts}; {_precisions(tallies)}"),
        Figure("redaction_recall", held.recall(kinds), RECALL_BAR, detail=f"{counts}; {_recalls(tallies)}"),
    ]


def load(path: Path) -> list[Labelled]:
    return [_labelled(json.loads(line)) for line in path.read_text(encoding="utf-8").splitlines()]


def _labelled(row: dict[str, Any]) -> Labelled:
    """A text lies in pieces: plain ones, and [kind, part, part, ...], credentials cut so that no scanner trips."""
    text, values = "", []
    for piece in row["text"]:
        if isinstance(piece, str):
            text += piece
            continue
        kind, *parts = piece
        values.append(Span(len(text), len(text) + len("".join(parts)), kind))
        text += "".join(parts)
    return Labelled(row["id"], row["part"], text, tuple(values))


def measure(texts: Sequence[Labelled], say: Say = lambda _: None) -> Tally:
    finder, tally = Redactor(RedactionSettings()), Tally()
    for text in texts:
        spans = finder.spans(text.text)
        for value in text.values:
            tally.labelled[value.kind] += 1
            tally.found[value.kind] += _within(text.text, value, spans)
        for span in spans:
            tally.replaced[span.kind] += 1
            tally.right[span.kind] += _within(text.text, span, text.values)
        for line in mistakes(text, spans):
            if text.part == "tune":
                say(line)
    return tally


def mistakes(text: Labelled, spans: Sequence[Span]) -> list[str]:
    """One line each: the text's id, the kind, missed or wrongly replaced."""
    missed = [f"{text.id} {v.kind} missed" for v in text.values if not _within(text.text, v, spans)]
    wrong = [f"{text.id} {s.kind} wrongly replaced" for s in spans if not _within(text.text, s, text.values)]
    return missed + wrong


def _within(text: str, one: Span, others: Sequence[Span]) -> bool:
    covered = {place for other in others if other.kind == one.kind for place in range(other.start, other.end)}
    return all(place in covered for place in range(one.start, one.end) if text[place].isalnum())


def _precisions(tallies: dict[str, Tally]) -> str:
    return "; ".join(
        f"{part}: "
        + ", ".join(
            f"{kind} {tally.precision([kind]):.2f} of {tally.replaced[kind]}" for kind in sorted(tally.replaced)
        )
        for part, tally in tallies.items()
    )


def _recalls(tallies: dict[str, Tally]) -> str:
    return "; ".join(
        f"{part}: "
        + ", ".join(f"{kind} {tally.recall([kind]):.2f} of {tally.labelled[kind]}" for kind in sorted(tally.labelled))
        for part, tally in tallies.items()
    )
