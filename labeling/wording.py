"""When two texts say the same in the same words, and whether a text contains given words."""

from __future__ import annotations

import re
import unicodedata
from typing import Any

_TYPOGRAPHY = str.maketrans({"’": "'", "‘": "'", "“": '"', "”": '"', "–": "-", "—": "-", "‑": "-"})
_INDENTED = re.compile(r"^(?: {2,}|\t)\S", re.MULTILINE)
_STATEMENT = re.compile(r"[;:{}()\[\]=][ \t]*$", re.MULTILINE)
_EDGES = " \t\n.,;:!?\"'"


def text_parts(content: Any) -> list[str] | None:
    """The texts of OpenAI's list of parts; None unless it is a list, and of nothing but text."""
    if isinstance(content, list) and all(isinstance(part, dict) and part.get("type") == "text" for part in content):
        return [str(part.get("text", "")) for part in content]
    return None


def holds_code_block(text: str) -> bool:
    """Then upper case, line breaks and indentation may mean something."""
    return "```" in text or (_INDENTED.search(text) is not None and _STATEMENT.search(text) is not None)


def same_wording(one: str, other: str) -> bool:
    """Equal but for white space and Unicode form. Case and punctuation count: they may be what was corrected."""
    return spelled(one) == spelled(other)


def spelled(text: str) -> str:
    return " ".join(unicodedata.normalize("NFC", text).split())


def stands_in(text: str, wanted: str) -> bool:
    """`wanted`, with any of its "a|b" alternatives, as whole words: "5" stands neither in "15" nor in "3.5"."""
    plain = folded(text)
    alternatives = [folded(part).strip(_EDGES) for part in wanted.split("|")]
    return any(re.search(_bounded(part), plain) for part in alternatives if part)


def folded(text: str) -> str:
    return " ".join(unicodedata.normalize("NFKC", text).translate(_TYPOGRAPHY).casefold().split())


def _bounded(part: str) -> str:
    before = r"(?<!\w)(?<!\d[.,])" if part[0].isalnum() else ""
    after = r"(?!\w)(?![.,]\d)" if part[-1].isalnum() else ""
    return f"{before}{re.escape(part)}{after}"
