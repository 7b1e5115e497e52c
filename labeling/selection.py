"""Which item a labeller sees next: a score from 0 to 1, the higher the sooner."""

from __future__ import annotations


def score(severity: float, count: int) -> float:
    """Severity (0..1) weighs 0.6; how often it was flagged 0.4, where each doubling closes half of what is missing."""
    often = 1 - 0.5 ** (max(count, 1).bit_length() - 1)
    return round(0.6 * severity + 0.4 * often, 4)
