"""Which words exist, from the frequency lists of pyspellchecker (subtitles, misspellings removed), in seven languages.

Loaded on the first question, kept as one text a language: about 20 MB, milliseconds a word.
"""

from __future__ import annotations

import gzip
import json
from functools import cache, lru_cache
from importlib.resources import files

LANGUAGES = ("en", "de", "es", "fr", "it", "pt", "nl")
COMMON = 200  # occurrences: the rarest words of the lists may be misspellings that were overlooked


def load() -> None:
    """Takes a second, once a process: not to be spent on the event loop."""
    _lists()


@lru_cache(maxsize=10_000)
def is_common(word: str) -> bool:
    return any(f"\n{word}\n" in common for common, _ in _lists())


@lru_cache(maxsize=10_000)
def is_unknown(word: str) -> bool:
    """In no language at all, however rare."""
    return not is_common(word) and not any(f"\n{word}\n" in rare for _, rare in _lists())


@cache
def _lists() -> tuple[tuple[str, str], ...]:
    """Common and rare words of each language."""
    return tuple(_of(language) for language in LANGUAGES)


def _of(language: str) -> tuple[str, str]:
    packed = files("spellchecker").joinpath("resources", f"{language}.json.gz").read_bytes()
    counts: dict[str, int] = json.loads(gzip.decompress(packed))

    common = [word for word, count in counts.items() if count >= COMMON]
    rare = [word for word, count in counts.items() if count < COMMON]
    return "\n".join(["", *common, ""]), "\n".join(["", *rare, ""])
