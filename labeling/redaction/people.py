"""Names as a model finds them, and which of them are one person's within an exchange.

A model's place may reach over a line's end, over an e-mail address or a possessive: here it becomes what is to be
replaced. "Anna" is the same person as "Anna Virtanen" where no other Anna is named.
"""

from __future__ import annotations

import re
from bisect import bisect_left
from collections.abc import Iterable, Iterator, Sequence

from labeling.redaction.page import Kind, Span

SHORTEST_PART = 3  # of a full name, that is looked for alone
MOST_WORDS = 6
_NO_NAME = re.compile(r"[\d@\\/_<>{}=|]")
# Before a name; they say of nobody who it is.
_TITLES = frozenset(
    {
        *("mr", "mrs", "ms", "miss", "mx", "sir", "madam", "dr", "prof", "professor", "judge", "nurse", "dear", "hi"),
        *("hello", "herr", "frau", "monsieur", "madame", "mme", "señor", "señora", "sr", "sra", "signor", "signora"),
    }
)
_SPACED = re.compile(r"\S{1,200}+")
_POSSESSIVE = re.compile(r"['’][sS]?$")
_WORDS = re.compile(r"[^\W\d_]{1,40}+(?:['’-][^\W\d_]{1,40}+){0,4}+")
_LOOK_BACK = 8
_SENTENCE_END = re.compile(rf"(?:^|[.!?:;\n>\"“(\[*-])\s{{0,{_LOOK_BACK}}}+$")

Range = tuple[int, int]


def name_spans(text: str, found: Iterable[Range], taken: Iterable[Range]) -> list[Span]:
    """`found`: places as the model gave them; `taken`: those of other kinds and of placeholders, which stay theirs."""
    barred = sorted(taken)
    starts = [start for start, _ in barred]
    names = []
    for place in found:
        for start, end in _free(_of_one_line(text, place), barred, starts):
            start, end = _trimmed(text, start, end)  # noqa: PLW2901  # the same piece, smaller
            if _is_name(text[start:end]):
                names.append(Span(start, end, Kind.NAME))
    return names


def _of_one_line(text: str, place: Range) -> Range:
    """The line with the most words: "Emma Johnston" of "Emma Johnston", "Tel" below it."""
    lines, at = [], place[0]
    for line in text[slice(*place)].splitlines(keepends=True):
        lines.append((at, at + len(line)))
        at += len(line)
    return max(lines, key=lambda line: len(_WORDS.findall(text, *line)), default=place)


def _free(place: Range, barred: Sequence[Range], starts: Sequence[int]) -> Iterator[Range]:
    start, end = place
    for taken_start, taken_end in barred[max(0, bisect_left(starts, start) - 1) :]:
        if taken_start >= end:
            break
        if taken_end <= start:
            continue
        if start < taken_start:
            yield start, taken_start
        start = max(start, taken_end)
    if start < end:
        yield start, end


def _trimmed(text: str, start: int, end: int) -> Range:
    """From its first word to its last that may be of a name: no titles, punctuation around them or possessive."""
    words = [match.span() for match in _SPACED.finditer(text, start, end) if not _NO_NAME.search(match[0])]
    while words and text[slice(*words[0])].casefold().strip(".,") in _TITLES:
        del words[0]
    if not words:
        return start, start
    start, end = words[0][0], words[-1][1]
    while start < end and not text[start].isalpha():
        start += 1
    while True:
        while start < end and not text[end - 1].isalpha():
            end -= 1
        possessive = _POSSESSIVE.search(text, start, end)
        if possessive is None or possessive.start() == start:
            return start, end
        end = possessive.start()


def _is_name(value: str) -> bool:
    """Letters, and not too many words: a model also takes code and product numbers for people."""
    letters = sum(map(str.isalpha, value))
    return letters >= 2 and not _NO_NAME.search(value) and len(value.split()) <= MOST_WORDS


class People:
    """The people of one exchange. All names are learned before the first is asked for: then order plays no part."""

    def __init__(self) -> None:
        self._names: dict[frozenset[str], None] = {}
        self._parts: set[str] = set()
        self._of: dict[frozenset[str], str] = {}

    def learn(self, names: Iterable[str]) -> None:
        for name in names:
            words = _WORDS.findall(name)
            self._names.setdefault(_key(name))
            if len(words) > 1:
                self._parts.update(word for word in words if len(word) >= SHORTEST_PART and word[0].isupper())

    def person(self, name: str) -> str:
        """Equal for the names of one person: the fullest that holds all words of this one, if it is the only such."""
        own = _key(name)
        if own not in self._of:
            fuller = [other for other in self._names if own < other]
            fullest = [one for one in fuller if not any(one < other for other in fuller)]
            self._of[own] = " ".join(sorted(fullest[0] if len(fullest) == 1 else own))
        return self._of[own]

    def mentions(self, text: str) -> Iterator[Range]:
        """Parts of full names, side by side as one, where the capital shows a name: not at a sentence's beginning."""
        start = end = -1
        for word in _WORDS.finditer(text) if self._parts else ():
            part = _POSSESSIVE.sub("", word[0])
            if part not in self._parts:
                continue
            if start >= 0 and text[end : word.start()] == " ":
                end = word.start() + len(part)
                continue
            if start >= 0:
                yield start, end
            before = text[max(0, word.start() - _LOOK_BACK) : word.start()]
            start, end = (-1, -1) if _SENTENCE_END.search(before) else (word.start(), word.start() + len(part))
        if start >= 0:
            yield start, end


def _key(name: str) -> frozenset[str]:
    """In any order and case, so that "Virtanen, Anna" is Anna Virtanen."""
    return frozenset(word.casefold() for word in _WORDS.findall(name)) or frozenset({name})
