"""How much of what should be replaced is, and how much else: on labelled texts of ours, by kind.

A labelled value is found when every letter and digit of it is replaced under its own kind. A replaced place is right
when every letter and digit in it belongs to a labelled value of that kind. The bars hold for the texts that the
patterns were never tuned on; `detail` has every kind, each part of the texts apart.

Names are measured apart, on texts of their own: what is measured is the model that tests and bench have, not yours.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from labeling.name_recogniser import close_all, names_python
from labeling.redaction.page import Kind, Span
from labeling.redaction.redactor import Redactor
from labeling.settings import RedactionSettings
from service.bench.figure import Figure, Say
from service.bench.promises import held, not_measured

TUNED = "tune"
NAMED = ("redaction_names_precision", "redaction_names_recall")
UNTUNED = ("held_out", "later")  # written before the patterns, and after them
TEXTS = Path(__file__).parent / "redaction_texts.jsonl"
NAMES = Path(__file__).parent / "redaction_names.jsonl"


@dataclass(frozen=True)
class Labelled:
    id: str
    part: str  # TUNED or of UNTUNED
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
    tallies = {part: measure([one for one in texts if one.part == part], say) for part in (TUNED, *UNTUNED)}
    untuned = [text for text in texts if text.part in UNTUNED]
    tally, kinds = measure(untuned), [kind.value for kind in Kind if kind is not Kind.NAME]
    counts = f"{len(untuned)} untuned texts"
    return [
        held("redaction_precision", tally.precision(kinds), _listed(counts, tallies, kinds, 0)),
        held("redaction_recall", tally.recall(kinds), _listed(counts, tallies, kinds, 1)),
        *_names(say),
    ]


def _names(say: Say) -> list[Figure]:
    folder = small_model()
    if folder is None:
        return not_measured(NAMED, "there is no model; `make names` installs one")
    finder, texts = Redactor(RedactionSettings(names_model_dir=folder)), load(NAMES)
    try:
        tallies = {
            part: measure([one for one in texts if one.part == part], say, finder) for part in (TUNED, UNTUNED[0])
        }
    finally:
        close_all()
    untuned, kinds, about = tallies[UNTUNED[0]], [Kind.NAME.value], f"{folder.name}, {len(texts)} texts"
    return [
        held(NAMED[0], untuned.precision(kinds), _listed(about, tallies, kinds, 0)),
        held(NAMED[1], untuned.recall(kinds), _listed(about, tallies, kinds, 1)),
    ]


def small_model() -> Path | None:
    """The folder of the English model in the environment that `make names` makes."""
    packages = Path(names_python()).parent.parent.glob("lib/python3*/site-packages/en_core_web_sm*/meta.json")
    return next((meta.parent for meta in sorted(packages)), None)


def _listed(counts: str, tallies: dict[str, Tally], kinds: Sequence[str], which: int) -> str:
    """`which`: 0 precision, 1 recall; each with the number that it is a share of."""

    def share(tally: Tally, listed: Sequence[str]) -> str:
        value = (tally.precision, tally.recall)[which](listed)
        return f"{value:.2f} of {sum((tally.replaced, tally.labelled)[which][kind] for kind in listed)}"

    parts = [
        f"{part}: {share(tally, kinds)} ({', '.join(f'{kind} {share(tally, [kind])}' for kind in kinds)})"
        for part, tally in tallies.items()
    ]
    return "; ".join([counts, *parts])


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


def measure(texts: Sequence[Labelled], say: Say = lambda _: None, finder: Redactor | None = None) -> Tally:
    finder, tally = finder or Redactor(RedactionSettings()), Tally()
    for text in texts:
        spans = finder.spans(text.text)
        for value in text.values:
            tally.labelled[value.kind] += 1
            tally.found[value.kind] += _within(text.text, value, spans)
        for span in spans:
            tally.replaced[span.kind] += 1
            tally.right[span.kind] += _within(text.text, span, text.values)
        for line in mistakes(text, spans):
            if text.part == TUNED:
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
