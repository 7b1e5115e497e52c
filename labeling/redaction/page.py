"""A text that finders look through, what they find, and the words that stand before it."""

from __future__ import annotations

import re
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from enum import StrEnum

REACH = 40  # characters before a number in which the word that explains it must end


class Kind(StrEnum):
    """What is replaced. The order is the precedence where two kinds claim the same characters."""

    PRIVATE_KEY = "private_key"
    KEY = "key"
    PASSWORD = "password"  # noqa: S105  # the name of a kind
    EMAIL = "email"
    IBAN = "iban"
    CARD = "card"
    NATIONAL_ID = "national_id"
    IP = "ip"
    PHONE = "phone"
    NAME = "name"


@dataclass(frozen=True, slots=True)
class Span:
    """Characters `start` to `end` of a text; `kind` is a Kind, or the name of a pattern of the project's own."""

    start: int
    end: int
    kind: str


_UNSPACED = "\u2e80"  # from here on scripts that write no space between words


def _escaped(word: str) -> str:
    return re.escape(word).replace(r"\ ", r"[ _-]?+")


@dataclass(frozen=True)
class Words:
    """Words of any language that say what the number after them is. Matched from the beginning of a word."""

    pattern: re.Pattern[str]

    @classmethod
    def of(cls, *words: str) -> Words:
        spaced = "|".join(_escaped(word) for word in words if word[0] < _UNSPACED)
        unspaced = "".join(f"|{_escaped(word)}" for word in words if word[0] >= _UNSPACED)
        return cls(re.compile(rf"(?<![^\W\d_])(?:{spaced or '(?!)'}){unspaced}", re.IGNORECASE))


class Page:
    """One text. Where words stand is looked up once for all numbers: many candidates cost no more than few."""

    def __init__(self, text: str) -> None:
        self.text = text
        self._ends: dict[int, list[int]] = {}

    def near(self, words: Words, start: int, reach: int = REACH) -> bool:
        """Whether one of the words ends at most `reach` characters before `start`."""
        at = self.last(words, start)
        return at is not None and start - at <= reach

    def last(self, words: Words, start: int) -> int | None:
        """Where the last of the words before `start` ends."""
        key = id(words)
        if key not in self._ends:
            self._ends[key] = [match.end() for match in words.pattern.finditer(self.text)]
        ends = self._ends[key]
        position = bisect_left(ends, start + 1)
        return ends[position - 1] if position else None

    def before(self, start: int, characters: int) -> str:
        return self.text[max(0, start - characters) : start]


Finder = Callable[[Page], Iterator[Span]]


_RANK = {kind.value: rank for rank, kind in enumerate(Kind)}


def without_overlaps(spans: Iterable[Span], taken: Iterable[tuple[int, int]]) -> list[Span]:
    """In order. Of those that claim the same characters own patterns win, then the order of Kind, then the longer one.

    `taken`: places that no span may touch.
    """
    starts, ends = [], []
    for start, end in sorted(taken):
        starts.append(start)
        ends.append(end)
    kept = []
    for span in sorted(spans, key=lambda span: (_RANK.get(span.kind, -1), span.start - span.end, span.start)):
        place = bisect_right(starts, span.start)
        free_before = place == 0 or ends[place - 1] <= span.start
        if span.start < span.end and free_before and (place == len(starts) or starts[place] >= span.end):
            starts.insert(place, span.start)
            ends.insert(place, span.end)
            kept.append(span)
    return sorted(kept, key=lambda span: span.start)
