"""Replaces what the finders find by stable placeholders such as <EMAIL_1>.

Within one exchange the same value has the same placeholder, in the prompt, the answer, the offered correction and what
users say of it; so the flagged answer agrees with its prompt, and a correction stays trainable.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

from labeling.name_recogniser import Ranges, name_recogniser
from labeling.redaction import contacts, keys, national_ids, network, passwords, payment
from labeling.redaction.leaves import changed, texts
from labeling.redaction.page import Finder, Kind, Page, Span, without_overlaps
from labeling.redaction.passwords import is_mixed, spellings
from labeling.redaction.people import People, name_spans
from labeling.redaction.plain import Plain, plain
from labeling.settings import RedactionSettings

PLACEHOLDER = re.compile(r"<([A-Z][A-Z0-9_]{0,31})_([1-9]\d{0,4})>")
PRECEDING = 60  # characters of what was said before: "What is your phone number?" explains a bare number
KNOWN_VALUES = 100  # looked for again, verbatim, in the whole exchange
SHORTEST_KNOWN = 5
ROUNDS = 3  # of looking for names: in a text with placeholders a model may see one that it passed over before

FINDERS: dict[Kind, tuple[Finder, ...]] = {
    Kind.PRIVATE_KEY: (keys.private_keys,),
    Kind.KEY: (keys.tokens, passwords.assigned_keys),
    Kind.PASSWORD: (passwords.passwords,),
    Kind.EMAIL: (contacts.emails,),
    Kind.IBAN: (payment.ibans,),
    Kind.CARD: (payment.cards,),
    Kind.NATIONAL_ID: (national_ids.national_ids,),
    Kind.IP: (network.ip_addresses,),
    Kind.PHONE: (contacts.phones,),
}
_EXACT = frozenset({Kind.KEY, Kind.PRIVATE_KEY, Kind.PASSWORD})


@cache
def redactor(settings: RedactionSettings) -> Redactor:
    """One for all projects with the same settings."""
    return Redactor(settings)


class Redactor:
    def __init__(self, settings: RedactionSettings) -> None:
        left_out = set(settings.leave_out)
        self._enabled = settings.enabled
        self._finders = [finder for kind, found in FINDERS.items() if kind not in left_out for finder in found]
        self._own = [(own.name, re.compile(own.regex)) for own in settings.patterns]
        self._keep = frozenset(map(_plain, settings.keep))
        self._domains = tuple(entry.casefold() for entry in settings.keep if entry.startswith("@"))
        self._names = name_recogniser(settings.names_model) if settings.names_model else None

    @property
    def finds_names(self) -> bool:
        return self._names is not None

    def names(self, texts: Sequence[str]) -> list[Ranges]:
        """Where the project's model sees names in each text, as it gave it; raises where it can't be asked."""
        return self._names.find(texts) if self._names is not None else [[] for _ in texts]

    def spans(self, text: str, before: str = "", names: Ranges | None = None) -> list[Span]:
        """What is to be replaced, in order, without overlaps. `before`: what was said before the text.

        `names`: of this text, where the model was asked already.
        """
        if not self._enabled or not text:
            return []
        read, lead = Plain(text), f"{plain(before[-PRECEDING:])}\n" if before else ""
        page = Page(lead + read.text)
        found = [_past_escape(page.text, span) for span in self._found(page)]
        shifted = [Span(s.start - len(lead), s.end - len(lead), s.kind) for s in found if s.start >= len(lead)]
        kept = [read.span(span) for span in shifted if not self.is_kept(read.text[span.start : span.end])]
        others = without_overlaps(kept, _taken(text))
        return without_overlaps([*others, *self._name_spans(text, names, others)], _taken(text))

    def open(self, *shown: Any) -> Redaction:
        """For one exchange. `shown`: texts and messages that may hold placeholders: their numbers are taken."""
        return Redaction(self, shown)

    def _found(self, page: Page) -> Iterator[Span]:
        for name, pattern in self._own:
            for match in pattern.finditer(page.text):
                yield Span(match.start(), match.end(), name)
        for finder in self._finders:
            yield from finder(page)

    def _name_spans(self, text: str, names: Ranges | None, others: Iterable[Span]) -> list[Span]:
        found = self.names([text])[0] if names is None else names
        taken = [*_taken(text), *((span.start, span.end) for span in others)]
        return [span for span in name_spans(text, found, taken) if not self.is_kept(text[span.start : span.end])]

    def is_kept(self, value: str) -> bool:
        return _plain(value) in self._keep or (bool(self._domains) and value.casefold().endswith(self._domains))


@dataclass(frozen=True)
class Redacted:
    """An exchange and what was said of it, in the order given."""

    messages: list[dict[str, Any]]
    answer: str
    others: list[str]
    counts: dict[str, int]  # kind -> places in messages, answer and others


class Redaction:
    """The values of one exchange and their placeholders."""

    def __init__(self, owner: Redactor, shown: Iterable[Any] = ()) -> None:
        self._owner = owner
        self._counts: Counter[str] = Counter()
        self._numbers: Counter[str] = Counter()
        self._placeholders: dict[tuple[str, str], str] = {}
        self._known: dict[str, str] = {}  # a value as it was written -> its kind
        self._spans: dict[tuple[str, str], list[Span]] = {}
        self._names: dict[str, Ranges] = {}  # a text -> where the model sees names in it
        self._people = People()
        for text in texts(list(shown)):
            self._reserve(text)

    def exchange(self, messages: Sequence[dict[str, Any]], answer: str, others: Sequence[str] = ()) -> Redacted:
        """All is read before anything is replaced: a value that one text gives away is replaced in every other."""
        redacted, places = self._exchange(messages, answer, others), 0
        for _ in range(ROUNDS - 1 if self._owner.finds_names else 0):
            if self._counts.total() == places:
                break
            places = self._counts.total()
            redacted = self._exchange(redacted.messages, redacted.answer, redacted.others)
        return redacted

    def _exchange(self, messages: Sequence[dict[str, Any]], answer: str, others: Sequence[str]) -> Redacted:
        said = list(texts(list(messages)))
        last = said[-1] if said else ""
        self._learn([*zip(said, ["", *said], strict=False), (answer, last), *((other, "") for other in others)])
        return Redacted(
            messages=self.messages(messages),
            answer=self.text(answer, last),
            others=[self.text(other) for other in others],
            counts=dict(self._counts),
        )

    def messages(self, messages: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
        """Every text in them: content and its parts, names, arguments of tool calls."""
        before = ""

        def follow(text: str) -> str:
            nonlocal before
            redacted, before = self.text(text, before), text
            return redacted

        return [changed(message, follow) for message in messages]

    def text(self, text: str, before: str = "") -> str:
        found = self._found(text, before)
        for span in found:  # known before the others of the same text are looked for
            self._placeholder(span.kind, text[span.start : span.end])
        spans = without_overlaps([*found, *self._seen_again(text)], _taken(text))
        if not spans:
            return text
        parts, end = [], 0
        for span in spans:
            parts += [text[end : span.start], self._placeholder(span.kind, text[span.start : span.end])]
            end = span.end
            self._counts[span.kind] += 1
        return self._as_json(text, "".join([*parts, text[end:]]), spans)

    def _learn(self, said: Sequence[tuple[str, str]]) -> None:
        """`said`: each text with what was said before it. All are read first: who Anna is may show in a later one."""
        for text, _ in said:
            self._reserve(text)
        self._ask_for_names([text for text, _ in said])
        found = [(text, span) for text, before in said for span in self._found(text, before)]
        for text, span in found:
            self._placeholder(span.kind, text[span.start : span.end])

    def _as_json(self, text: str, redacted: str, spans: Sequence[Span]) -> str:
        """A number in JSON can't become a placeholder without quotes: there each value is replaced by itself."""
        if not text.lstrip().startswith(("{", "[")) or _is_json(redacted) or not _is_json(text):
            return redacted
        self._counts -= Counter(span.kind for span in spans)  # they are counted again, value by value
        value = json.loads(text)
        self._ask_for_names(list(texts(value)))
        return json.dumps(changed(value, self.text), ensure_ascii=False)

    def _ask_for_names(self, said: Sequence[str]) -> None:
        """In one go, and once a text."""
        new = [text for text in dict.fromkeys(said) if text not in self._names]
        self._names.update(zip(new, self._owner.names(new), strict=True))

    def _found(self, text: str, before: str) -> list[Span]:
        key = (text, before[-PRECEDING:])
        if key not in self._spans:
            self._ask_for_names([text])
            spans = self._spans[key] = self._owner.spans(text, before, self._names[text])
            self._people.learn(text[span.start : span.end] for span in spans if span.kind == Kind.NAME)
        return self._spans[key]

    def _seen_again(self, text: str) -> Iterator[Span]:
        """Where a known value stands without the words that gave it away."""
        read = Plain(text)
        for value, kind in self._known.items():
            alone = kind not in _EXACT or not is_mixed(value)
            start = read.text.find(value)
            while start >= 0:
                end = start + len(value)
                joined = read.text[max(0, start - 1) : start].isalnum() or read.text[end : end + 1].isalnum()
                if not (alone and joined):
                    yield read.span(Span(start, end, kind))
                start = read.text.find(value, end)
        for start, end in self._people.mentions(text):
            if not self._owner.is_kept(text[start:end]):
                yield Span(start, end, Kind.NAME)

    def _placeholder(self, kind: str, value: str) -> str:
        key = (kind, self._people.person(value) if kind == Kind.NAME else _same(kind, value))
        if key not in self._placeholders:
            name = kind.upper()
            self._numbers[name] += 1
            self._placeholders[key] = f"<{name}_{self._numbers[name]}>"
        for written in spellings(kind, plain(value)):
            if len(written) >= SHORTEST_KNOWN and len(self._known) < KNOWN_VALUES:
                self._known.setdefault(written, kind)
        return self._placeholders[key]

    def _reserve(self, text: str) -> None:
        for match in PLACEHOLDER.finditer(text):
            self._numbers[match[1]] = max(self._numbers[match[1]], int(match[2]))


def placeholders(value: Any) -> set[str]:
    """Those that stand in a text or in messages."""
    return {match[0] for text in texts(value) for match in PLACEHOLDER.finditer(text)}


def _taken(text: str) -> list[tuple[int, int]]:
    return [match.span() for match in PLACEHOLDER.finditer(text)]


def _is_json(text: str) -> bool:
    try:
        json.loads(text)
    except (ValueError, RecursionError):
        return False
    return True


def _past_escape(text: str, span: Span) -> Span:
    """In JSON within a text a value may follow the two characters of an escaped line end: the n is no part of it."""
    escaped = span.start > 0 and text[span.start - 1] == "\\" and text[span.start] in "nrtbf"
    return Span(span.start + 1, span.end, span.kind) if escaped and span.end - span.start > 1 else span


def _plain(value: str) -> str:
    """Without case and separators: two ways to write the same number or address."""
    return "".join(char for char in plain(value).casefold() if char not in " -./()")


def _same(kind: str, value: str) -> str:
    """Equal for two ways to write one value of this kind."""
    value = plain(value)
    if kind in _EXACT or kind not in set(Kind):
        return spellings(kind, value)[-1]
    return " ".join(value.casefold().split()) if kind == Kind.EMAIL else _plain(value)
