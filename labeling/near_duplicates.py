"""Finds texts that are almost the same: MinHash proposes (rensa), the exact Jaccard similarity of shingles decides.

Lexical only: a synonym makes two texts differ, and a single changed word in a long one does not. Other numbers do:
"3 plus 4" is not "3 plus 5". It serves the contamination guard, where a false alarm costs one training row.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Hashable
from typing import Generic, TypeVar

from rensa import RMinHash, RMinHashLSH

K = TypeVar("K", bound=Hashable)

SHINGLE = 3  # characters: one changed letter in a short question costs little
PERMUTATIONS = 128
BANDS = 32  # 4 rows a band: a pair at similarity 0.6 is proposed 99 times in 100
SEED = 1


def normalised_prompt(text: str) -> str:
    """NFKC, case folded, letters and digits only, single spaces: what makes two prompts the same question."""
    folded = unicodedata.normalize("NFKC", text).casefold()
    return " ".join("".join(char if char.isalnum() else " " for char in folded).split())


def shingles(text: str) -> frozenset[str]:
    """Overlapping runs of characters of the normalised text; a shorter text is one shingle."""
    plain = normalised_prompt(text)
    return frozenset(plain[i : i + SHINGLE] for i in range(max(1, len(plain) - SHINGLE + 1)))


class NearDuplicates(Generic[K]):
    """An index of texts under keys; `find` gives the most similar one at or above `threshold`."""

    def __init__(self, threshold: float = 0.75) -> None:
        self.threshold = threshold
        self._index = RMinHashLSH(threshold=threshold, num_perm=PERMUTATIONS, num_bands=BANDS)
        self._texts: list[tuple[K, frozenset[str], list[str]]] = []

    def add(self, key: K, text: str) -> None:
        grams = shingles(text)
        self._index.insert(len(self._texts), _sketch(grams))
        self._texts.append((key, grams, _numbers(text)))

    def find(self, text: str) -> tuple[K, float] | None:
        grams, numbers = shingles(text), _numbers(text)
        proposed = [self._texts[position] for position in self._index.query(_sketch(grams))]
        scored = [
            (key, len(grams & other) / len(grams | other)) for key, other, theirs in proposed if theirs == numbers
        ]
        best = max(scored, key=lambda pair: pair[1], default=None)
        return best if best and best[1] >= self.threshold else None


def _numbers(text: str) -> list[str]:
    return sorted(word for word in normalised_prompt(text).split() if word.isdecimal())


def _sketch(grams: frozenset[str]) -> RMinHash:
    sketch = RMinHash(num_perm=PERMUTATIONS, seed=SEED)
    sketch.update(sorted(grams))
    return sketch
