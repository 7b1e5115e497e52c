"""Whether two prompts ask the same in nearly the same words. A doubt is a no: two facts in one item would be worse.

Equal must be every word that carries meaning, in its order: names, numbers, negations, prepositions, code. Free are
punctuation, greetings, forms of politeness, where an auxiliary stands in a question, and misspelt words.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from labeling.lexicon import is_common, is_unknown
from labeling.question_form import SHORTEST_MISSPELT, QuestionForm, Token, question_form, without_accents

MISSPELT_AT_MOST = 3  # words a prompt


def same_question(one: Sequence[dict[str, Any]], other: Sequence[dict[str, Any]]) -> bool:
    mine, theirs = question_form(one), question_form(other)
    return mine is not None and theirs is not None and same_form(mine, theirs)


def same_form(one: QuestionForm, other: QuestionForm) -> bool:
    if (one.context, one.moved, len(one.tokens)) != (other.context, other.moved, len(other.tokens)):
        return False
    unequal = [(a, b) for a, b in zip(one.tokens, other.tokens, strict=True) if a.text != b.text]
    return len(unequal) <= MISSPELT_AT_MOST and all(_misspelt(a, b) for a, b in unequal)


def _misspelt(one: Token, other: Token) -> bool:
    """One is a common word, the other in no dictionary, and what differs is a slip that seldom makes another word."""
    if not (one.plain and other.plain):
        return False
    a, b = one.text, other.text
    if min(len(a), len(b)) < SHORTEST_MISSPELT or a[0] != b[0] or not _a_slip(a, b):
        return False
    return (is_common(a) and is_unknown(b)) or (is_common(b) and is_unknown(a))


def _a_slip(a: str, b: str) -> bool:
    """An accent left out, two neighbours swapped, or a letter inside single instead of doubled."""
    if not (a.isalpha() and b.isalpha()):
        return False
    if without_accents(a) == without_accents(b):
        return without_accents(a).isascii()
    return (a.isascii() and b.isascii()) and (_swapped(a, b) or _doubled(*sorted((a, b), key=len)))


def _swapped(a: str, b: str) -> bool:
    if len(a) != len(b):
        return False
    places = [i for i, (x, y) in enumerate(zip(a, b, strict=True)) if x != y]
    return (
        len(places) == 2
        and places[1] == places[0] + 1
        and a[places[0]] == b[places[1]]
        and a[places[1]] == b[places[0]]
    )


def _doubled(short: str, long: str) -> bool:
    """Not at the end, where it makes names: fiver, Fiverr."""
    if len(long) != len(short) + 1:
        return False
    return any(long[i] == long[i + 1] and long[:i] + long[i + 1 :] == short for i in range(1, len(long) - 2))
