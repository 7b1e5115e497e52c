"""Finds texts that are almost the same: MinHash proposes (rensa), the exact Jaccard similarity of shingles decides.

Lexical only: a synonym makes two texts differ, and a single changed word in a long one does not. Other numbers do:
"3 plus 4" is not "3 plus 5". It serves the contamination guard, where a false alarm costs one training row; which
flags are one review item is decided by `folding`. `repeated` looks through many texts at once, forty times as fast.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Hashable, Iterator, Sequence
from typing import Generic, TypeVar

import numpy as np
from numpy.typing import NDArray
from rensa import RMinHash, RMinHashLSH

K = TypeVar("K", bound=Hashable)

SHINGLE = 3  # characters: one changed letter in a short question costs little
PERMUTATIONS = 128
BANDS = 32  # 4 rows a band: a pair at similarity 0.6 is proposed 99 times in 100
SEED = 1
_OTHER = re.compile(r"[\W_]+")
_ASCII = {code: chr(code).lower() if chr(code).isalnum() else " " for code in range(128)}
_MIX = np.uint64(0x9E3779B97F4A7C15)
_AT_ONCE = 16_000  # characters: their hashes stay in the processor's cache


def normalised_prompt(text: str) -> str:
    """NFKC, case folded, letters and digits only, single spaces: what makes two prompts the same question."""
    if text.isascii():
        return " ".join(text.translate(_ASCII).split())
    return _OTHER.sub(" ", unicodedata.normalize("NFKC", text).casefold()).strip()


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


def repeated(texts: Sequence[str], shingle: int = SHINGLE) -> NDArray[np.bool_]:
    """For each text whether another of them is proposed as its near-duplicate: all that are, and some that are not."""
    if not texts:
        return np.zeros(0, np.bool_)
    plain = [normalised_prompt(text).ljust(shingle) for text in texts]
    offsets = np.zeros(len(plain) + 1, np.int64)
    np.cumsum([len(text) - shingle + 1 for text in plain], out=offsets[1:])
    hashes = np.concatenate([_shingle_hashes(part, shingle) for part in _parts(plain)])
    index = RMinHashLSH(threshold=0.5, num_perm=PERMUTATIONS, num_bands=BANDS)  # the threshold is only kept by it
    matrix = RMinHash.digest_matrix_from_flat_token_hashes(hashes, offsets, PERMUTATIONS, SEED)
    return np.array(index.insert_matrix_and_query_duplicate_flags(matrix, 0), np.bool_)


def _parts(texts: Sequence[str]) -> Iterator[list[str]]:
    part: list[str] = []
    size = 0
    for text in texts:
        part.append(text)
        size += len(text)
        if size >= _AT_ONCE:
            yield part
            part, size = [], 0
    if part:
        yield part


def _shingle_hashes(texts: Sequence[str], shingle: int) -> NDArray[np.uint64]:
    """Of every run of `shingle` characters that lies within one text, in order."""
    codes = np.frombuffer("".join(texts).encode("utf-32-le", "surrogatepass"), np.uint32).astype(np.uint64)
    runs = len(codes) - shingle + 1
    hashes = codes[:runs].copy()
    for place in range(1, shingle):
        hashes *= _MIX
        hashes += codes[place : place + runs]
    hashes ^= hashes >> np.uint64(31)
    hashes *= _MIX
    hashes ^= hashes >> np.uint64(32)
    within = np.ones(len(codes), np.bool_)
    ends = np.cumsum([len(text) for text in texts])
    for place in range(1, shingle):
        within[ends - place] = False
    return hashes[within[:runs]]
