"""Shares of counted things with their 95 % intervals: what may be said when few were counted."""

from __future__ import annotations

import math
from dataclasses import dataclass

Z = 1.959964  # two-sided 95 %


@dataclass(frozen=True)
class Proportion:
    """`hits` of `n`."""

    hits: int
    n: int

    @property
    def share(self) -> float | None:
        return self.hits / self.n if self.n else None

    @property
    def interval(self) -> tuple[float, float]:
        """Wilson's score interval; everything is possible where nothing was counted."""
        if not self.n:
            return 0.0, 1.0
        share, n = self.hits / self.n, self.n
        centre = (share + Z * Z / (2 * n)) / (1 + Z * Z / n)
        half = Z / (1 + Z * Z / n) * math.sqrt(share * (1 - share) / n + Z * Z / (4 * n * n))
        return max(0.0, min(centre - half, share)), min(1.0, max(centre + half, share))

    def as_json(self) -> dict[str, float | int | list[float] | None]:
        low, high = self.interval
        share = None if self.share is None else round(self.share, 4)
        return {"hits": self.hits, "n": self.n, "share": share, "interval": [round(low, 4), round(high, 4)]}


def difference(one: Proportion, other: Proportion) -> tuple[float, float, float] | None:
    """one - other, with Newcombe's (1998) hybrid score interval; None where either counted nothing."""
    if one.share is None or other.share is None:
        return None
    (low_1, high_1), (low_2, high_2) = one.interval, other.interval
    seen = one.share - other.share
    below = math.hypot(one.share - low_1, high_2 - other.share)
    above = math.hypot(high_1 - one.share, other.share - low_2)
    return seen, seen - below, seen + above
