"""Shares drawn by hash: the same for the same seed, for ever, and nobody who sends feedback can choose them."""

from __future__ import annotations

import hashlib


def drawn(seed: str) -> float:
    """0 <= x < 1, evenly spread, from the seed alone."""
    return int.from_bytes(hashlib.sha256(seed.encode()).digest()[:8]) / 2**64


def in_share(seed: str, share: float) -> bool:
    """`share` of all seeds. A purpose at the seed's beginning makes it independent of every other draw."""
    return drawn(seed) < share
