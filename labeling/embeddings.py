"""Vectors of texts, for novelty and for folding by meaning: hashed n-grams, or a sentence model from a local folder.

No torch, no network. Vectors of two embedders can't be compared: store `name` beside what you keep.
"""

from __future__ import annotations

import math
import re
import unicodedata
import zlib
from collections import Counter
from collections.abc import Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from labeling.sentence_model import SentenceModel

Vectors = NDArray[np.float32]
NGRAMS = range(3, 6)
DIMENSIONS = 512
_WORDS = re.compile(r"\w+")


class Embedder(Protocol):
    """`embed` gives float32 [len(texts), dimensions], rows of unit length: their dot product is the cosine."""

    @property
    def name(self) -> str: ...

    @property
    def dimensions(self) -> int: ...

    def embed(self, texts: Sequence[str]) -> Vectors: ...


class HashedNgrams:
    """Words and their runs of 3 to 5 characters, hashed with a sign (Weinberger et al., 2009): needs no model.

    Close are texts that share spelling, in any language; a paraphrase in other words is far.
    """

    def __init__(self, dimensions: int = DIMENSIONS) -> None:
        self.dimensions = dimensions
        self.name = f"hashed-ngrams-{dimensions}"

    def embed(self, texts: Sequence[str]) -> Vectors:
        vectors = np.zeros((len(texts), self.dimensions), np.float32)
        for row, text in enumerate(texts):
            self._add(vectors[row], text)
        return vectors

    def _add(self, row: NDArray[np.float32], text: str) -> None:
        for part, count in Counter(_parts(text)).items():
            number = zlib.crc32(part.encode("utf-8", "surrogatepass"))
            row[(number >> 1) % self.dimensions] += math.sqrt(count) * (1 if number & 1 else -1)
        length = float(np.linalg.norm(row))
        if length:
            row /= length
        else:  # nothing but punctuation, or all cancelled out
            row[0] = 1.0


def _parts(text: str) -> Iterator[str]:
    for word in _WORDS.findall(unicodedata.normalize("NFKC", text).casefold()):
        yield word
        framed = f" {word} "
        for size in NGRAMS:
            yield from (framed[i : i + size] for i in range(len(framed) - size + 1))


@lru_cache(maxsize=4)
def embedder(model_dir: Path | None) -> Embedder:
    """The model in that folder, loaded once a process; without one, hashed n-grams."""
    return HashedNgrams() if model_dir is None else SentenceModel(model_dir)
