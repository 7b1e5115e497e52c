"""A text as the finders read it: evasions and typography undone, and each character's place in the text as it was sent.

Characters without width (zero-width spaces and joiners, soft hyphens) are passed over; digits of any script and
full-width letters and signs are read as ASCII's, blanks of any width as a blank, dashes as a hyphen.
"""

from __future__ import annotations

import re
import unicodedata
from functools import cache

from labeling.redaction.page import Span

_WITHOUT_WIDTH = "\u00ad\u034f\u061c\u180e\u200b-\u200f\u202a-\u202e\u2060-\u2064\u2066-\u206f\ufe00-\ufe0f\ufeff"
_BLANKS = "\u00a0\u2000-\u200a\u202f\u205f\u3000"
_DASHES = "\u2010-\u2015\u2212\ufe58\ufe63\uff0d"
_INVISIBLE = re.compile(f"[{_WITHOUT_WIDTH}]")
_OTHER = re.compile(rf"[{_BLANKS}{_DASHES}\uff01-\uff5e]|(?![0-9])\d")


class Plain:
    """`text` is what is read; `span` leads from a place in it to the place in the text as it was sent."""

    def __init__(self, sent: str) -> None:
        self._places: list[int] | None = None
        self.text = sent
        if sent.isascii():
            return
        if _INVISIBLE.search(sent):
            self._places = [place for place, char in enumerate(sent) if not _INVISIBLE.match(char)]
            sent = "".join(map(sent.__getitem__, self._places))
        self.text = _OTHER.sub(lambda match: _ascii(match[0]), sent)

    def span(self, span: Span) -> Span:
        if self._places is None or span.start >= span.end:
            return span
        return Span(self._places[span.start], self._places[span.end - 1] + 1, span.kind)


def plain(text: str) -> str:
    return Plain(text).text


@cache
def _ascii(char: str) -> str:
    """Always one character, so that places stay."""
    digit = unicodedata.decimal(char, None)
    if digit is not None:
        return str(digit)
    if "\uff01" <= char <= "\uff5e" and char != "\uff0d":
        return chr(ord(char) - 0xFEE0)
    return " " if char.isspace() else "-"
