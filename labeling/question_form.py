"""A prompt taken apart, so that two can be compared word by word: what is asked, without greetings and punctuation.

`key` is equal for all prompts that `same_question` could take for one: it is what an index needs, and no proof.
"""

from __future__ import annotations

import hashlib
import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any
from unicodedata import east_asian_width

from labeling.question_words import (
    ABOUT_SPELLING,
    ABOUT_WORDS,
    ACRONYMS,
    ASKING,
    BEFORE_ASKING,
    CONTRACTIONS,
    LEADING,
    MOVABLE,
    REQUESTING,
    TRAILING,
    WITHOUT_ACCENT,
)
from labeling.wording import holds_code_block, text_parts

LONGEST = 20_000  # characters; a longer prompt folds with identical ones only
SHORTEST_MISSPELT = 5  # letters: in shorter words one changed letter is mostly another word
WRAPPED_AT_MOST = 8  # greetings and the like around one question
MOVED_AT_MOST = 2  # with more of them, their order is part of the meaning
THE_FROM = 6  # words: "what is the matrix" is not "what is matrix"
_TYPOGRAPHY = str.maketrans({"’": "'", "‘": "'", "ʼ": "'", "“": '"', "”": '"', "„": '"', "–": "-", "—": "-", "…": "."})
_OUTSIDE = " \t\n.,;:!?\"'«»¿¡"
_PLAIN_WORD = re.compile(r"[^\W\d_]+(?:['-][^\W\d_]+)*")
_CODE = re.compile(r"[_\\{}<>=\[\]|`$~^]|;$|\w\(|\w\.\w+\(|://|\b[a-z]+[A-Z]\w*\(|^[ \t]{2,}\S", re.MULTILINE)
_PLACEHOLDER = re.compile(r"[\[<{][A-Z][A-Z0-9_ ]*[\]>}]")
_SENTENCE_END = (".", "?", "!", ":", ";")


@dataclass(frozen=True)
class Token:
    """`plain`: a lower-case word in a sentence, where a misspelling may be told from another word."""

    text: str
    plain: bool
    pause: bool = False  # punctuation behind it


@dataclass(frozen=True)
class QuestionForm:
    """`context` is the digest of all messages but the last user's."""

    context: str
    tokens: tuple[Token, ...]
    moved: tuple[str, ...]  # the auxiliaries of a question, wherever they stood, in their order

    @property
    def key(self) -> int:
        """A signed 64-bit number, as both databases store it."""
        parts = [self.context, *(skeleton(token.text) for token in self.tokens), "", *self.moved]
        data = "\n".join(parts).encode("utf-8", "surrogatepass")
        return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), signed=True)


def question_form(messages: Sequence[dict[str, Any]]) -> QuestionForm | None:
    """None where only the identical prompt is the same: no text, no user's word last, empty or very long."""
    if not messages or messages[-1].get("role") != "user":
        return None
    texts = [_text(message) for message in messages]
    if any(text is None for text in texts) or sum(len(text or "") for text in texts) > LONGEST:
        return None
    roles = [str(message.get("role")) for message in messages]
    context = "\n\n".join(f"{role}\n{collapsed(text or '')}" for role, text in zip(roles[:-1], texts, strict=False))
    return _taken_apart(hashlib.sha256(context.encode("utf-8", "surrogatepass")).hexdigest(), texts[-1] or "")


def looks_like_code(text: str) -> bool:
    """Where it does, every sign and upper case count. Placeholders such as [EMAIL_1] do not."""
    return _CODE.search(_PLACEHOLDER.sub("", text)) is not None


def skeleton(word: str) -> str:
    """Equal for a word and its likely misspellings: accents, doubled and swapped letters inside are forgotten."""
    if len(word) < SHORTEST_MISSPELT:
        return word
    bare = without_accents(word)
    single = [letter for letter, before in zip(bare, " " + bare, strict=False) if letter != before]
    return "".join([single[0], *sorted(single[1:])])


def without_accents(word: str) -> str:
    return "".join(char for char in unicodedata.normalize("NFD", word) if not unicodedata.combining(char))


def _text(message: dict[str, Any]) -> str | None:
    """None for what is more than a role and a text: tool calls, pictures."""
    if any(message.get(key) for key in message.keys() - {"role", "content"}):
        return None
    content = message.get("content")
    if (parts := text_parts(content)) is not None:
        content = " ".join(parts)
    return content if isinstance(content, str) else None


def collapsed(text: str) -> str:
    """Equal for texts that differ in white space, in Unicode form and width, and, where there is no code, in case.

    Not in NFKC, for which 2⁵ is 25.
    """
    plain = text if text.isascii() else unicodedata.normalize("NFC", "".join(map(_of_one_width, text)))
    plain = " ".join(plain.split())
    return plain if looks_like_code(plain) else " ".join(plain.casefold().split())


def _of_one_width(char: str) -> str:
    return unicodedata.normalize("NFKC", char) if east_asian_width(char) in "FH" else char


def _taken_apart(context: str, text: str) -> QuestionForm | None:
    if holds_code_block(text):
        return None
    words = _tokens(unicodedata.normalize("NFC", text).translate(_TYPOGRAPHY))
    if any(token.text in ABOUT_SPELLING for token in words):
        return None
    words = _unwrapped(words)
    if not words:
        return None
    words = _without_the(words)
    words[0] = replace(words[0], text=WITHOUT_ACCENT.get(words[0].text, words[0].text))
    moved = [token.text for token in words if token.text in MOVABLE]
    if not _asks(words) or len(moved) > MOVED_AT_MOST:
        return QuestionForm(context, tuple(words), ())
    return QuestionForm(context, tuple(w for w in words if w.text not in MOVABLE), tuple(moved))


def _tokens(text: str) -> list[Token]:
    letters = [char for char in text if char.isalpha()]
    shouted = sum(char.isupper() for char in letters) > len(letters) / 2
    exact = looks_like_code(text)
    found: list[Token] = []
    starts_sentence = True
    for chunk in text.split():
        if written := _without_punctuation(chunk):
            read = [Token(written, False)] if exact else _read(written, starts_sentence, shouted)
            found += [*read[:-1], replace(read[-1], pause=not chunk.endswith(written))]
        elif found:
            found[-1] = replace(found[-1], pause=True)
        starts_sentence = chunk.endswith(_SENTENCE_END)
    return found if '"' not in text else [replace(token, plain=False) for token in found]


def _without_punctuation(chunk: str) -> str:
    """Not where it may be part of a sign: 5!, 6", f', .NET, -3. Empty for a mark or dash that stands alone."""
    core = chunk.strip(_OUTSIDE)
    if not core:
        return ""
    lead = chunk[: chunk.index(core)]
    if len(core) == 1 or any(char.isdigit() for char in core):
        core = chunk[len(lead) :].rstrip(".,;:?")
    if core == "-" or not core:
        return ""
    return lead + core if "." in lead or not core[0].isalpha() else core


def _read(core: str, starts_sentence: bool, shouted: bool) -> list[Token]:
    """Whatever is more than letters, apostrophe and hyphen counts as it is written: numbers, amounts, paths."""
    if not _PLAIN_WORD.fullmatch(core):
        return [Token(core if core[0] == "-" else core.casefold(), False)]
    word = core.casefold()
    inside = any(char.isupper() for char in core[1:])  # iPhone, mV, US
    if inside and not shouted and (word in ACRONYMS or len(core) == 2 or (len(core) < 5 and not core.isupper())):
        return [Token(core, False)]
    named = not starts_sentence and not shouted and core != core.lower()
    parts = CONTRACTIONS.get(word, (word,))
    return [Token(part, len(parts) == 1 and not named and not inside and word.isalpha()) for part in parts]


def _unwrapped(tokens: list[Token]) -> list[Token]:
    for _ in range(WRAPPED_AT_MOST):
        line = " ".join(token.text for token in tokens)
        lead, tail = LEADING.match(line), TRAILING.search(line)
        if lead is not None and _addresses(lead, tokens):
            tokens = tokens[lead[0].count(" ") :]  # never all of them: a blank stands behind what was matched
        elif tail is not None and _closes(tail, tokens):
            tokens = tokens[: -tail[0].count(" ")]
        else:
            break
    return tokens


def _addresses(lead: re.Match[str], tokens: list[Token]) -> bool:
    """Not "hey jude": a greeting ends with a mark, or with how a request begins."""
    words = lead[0].count(" ")
    return lead["greeting"] is None or tokens[words - 1].pause or tokens[words].text in ASKING | REQUESTING


def _closes(tail: re.Match[str], tokens: list[Token]) -> bool:
    """Not "a card that says thank you"."""
    before = tokens[-tail[0].count(" ") - 1 : -tail[0].count(" ")]
    if not before or (before[0].text in ABOUT_WORDS and not (before[0].pause and before[0].text in MOVABLE)):
        return False
    return tail["thanks"] is None or before[0].pause


def _without_the(tokens: list[Token]) -> list[Token]:
    """In a long sentence, before a plain word, "the" is often left out."""
    kept = [
        token
        for token, behind in zip(tokens, [*tokens[1:], Token("", False)], strict=True)
        if not (token.text == "the" and behind.plain)
    ]
    return kept if len(kept) >= THE_FROM else tokens


def _asks(tokens: list[Token]) -> bool:
    first = [token.text for token in tokens[:2]]
    return first[0] in ASKING or (first[0] in BEFORE_ASKING and first[-1] in ASKING)
