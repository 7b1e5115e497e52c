"""Paired statistics of the gate. Counts are of items: `lost` = current right, candidate wrong; `won` = the reverse.

Nothing here knows of families or decisions; `loop.gate` does. All tests are one-sided, since only one side is asked.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import product
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray
from scipy.special import bdtrc, stdtrit  # scipy.stats has the same and takes a second to import

EXACT_UP_TO = 14  # pairs that differ: 2^14 sign patterns are enumerated, more are sampled
SAMPLED_PATTERNS = 20_000
POWER = 0.8
USUAL_DISCORDANCE = 0.2  # share of items on which two versions of a small model differ, seen between nights
MOST_ITEMS = 1_000_000


def mcnemar_loss(lost: int, won: int) -> float:
    """Exact one-sided McNemar: chance of at least `lost` losses among the items that differ, if either were as likely.

    McNemar (1947), exact binomial form; with nothing that differs it is 1.
    """
    return 1.0 if lost == 0 else float(bdtrc(lost - 1, lost + won, 0.5))


def mcnemar_gain(lost: int, won: int) -> float:
    return mcnemar_loss(won, lost)


def permutation_loss(differences: Sequence[float], seed: int = 0) -> float:
    """Sign-flip test of graded scores; `differences` are current minus candidate, so a loss is positive.

    Exact for few pairs that differ, otherwise sampled with the identity counted (Phipson and Smyth 2010): never 0.
    """
    values = np.array([value for value in differences if value != 0.0])
    if values.size == 0:
        return 1.0
    seen = values.sum() - 1e-12 * np.abs(values).sum()
    if values.size <= EXACT_UP_TO:
        signs = np.array(list(product((1.0, -1.0), repeat=values.size)))
        return float((signs @ values >= seen).mean())
    random = np.random.default_rng(seed)
    sums = random.choice((1.0, -1.0), size=(SAMPLED_PATTERNS, values.size)) @ values
    return float((1 + (sums >= seen).sum()) / (1 + SAMPLED_PATTERNS))


def holm(p_values: Sequence[float]) -> list[float]:
    """Adjusted p-values, in the given order (Holm 1979): all together err at most at the level, however related."""
    order = sorted(range(len(p_values)), key=lambda index: p_values[index])
    adjusted = [0.0] * len(p_values)
    highest = 0.0
    for rank, index in enumerate(order):
        highest = max(highest, (len(p_values) - rank) * p_values[index])
        adjusted[index] = min(1.0, highest)
    return adjusted


def loss_upper_bound(lost: float, won: float, n: int, alpha: float = 0.05) -> float:
    """Upper 1-alpha bound of the true loss P(lost) - P(won), in -1..1.

    Tango's score interval for a paired difference (Statistics in Medicine 17, 1998, 891-908) with half a lost item
    added: without it the one-sided coverage falls to 92-94 % at few losses, with it an enumeration of every outcome
    for n of 20 to 200 stays at 95 % or above. Valid with nothing discordant (n = 50: 6.8 points).
    """
    if n == 0:
        return 1.0
    lost, items = lost + 0.5, n + 0.5
    lowest, highest = (lost - won) / items, 1.0
    z = _z(alpha)
    for _ in range(60):
        middle = (lowest + highest) / 2
        if _tango_z(lost, won, items, middle) > -z:
            lowest = middle
        else:
            highest = middle
    return highest


def _tango_z(lost: float, won: float, n: float, delta: float) -> float:
    """The score statistic at a supposed difference; q is the constrained estimate of P(won), the larger root."""
    a = 2 * n
    b = -lost - won + (2 * n - lost + won) * delta
    c = -won * delta * (1 - delta)
    q = (math.sqrt(max(b * b - 4 * a * c, 0.0)) - b) / (2 * a)
    variance = n * (2 * q + delta * (1 - delta))
    return (lost - won - n * delta) / math.sqrt(max(variance, 1e-300))


def graded_loss_upper_bound(differences: Sequence[float], alpha: float = 0.05) -> float:
    """The same for graded scores 0..1: Student's bound of the mean, with half an item lost outright added."""
    if not differences:
        return 1.0
    values: NDArray[np.float64] = np.array([*differences, 1.0])
    weights = np.ones(values.size)
    weights[-1] = 0.5
    mean = float(np.average(values, weights=weights))
    spread = float(np.average((values - mean) ** 2, weights=weights))
    total = float(weights.sum())
    return min(1.0, mean + float(stdtrit(max(1, len(differences) - 1), 1 - alpha)) * math.sqrt(spread / total))


def standalone_items(margin: float, alpha: float = 0.05) -> int:
    """How many items a family needs to bound its loss below `margin` alone, 4 times in 5, when there is none.

    n = d (z_alpha + z_power)^2 / margin^2 with d the usual discordance: 1,979 for 2.5 points, 194 for 8.
    """
    z = _z(alpha) + _z(1 - POWER)
    return math.ceil(USUAL_DISCORDANCE * z * z / (margin * margin))


def items_that_decide(
    lost: float, won: float, n: int, margin: float, alpha: float = 0.05, tests: int = 1
) -> int | None:
    """About how many more items, losing and winning at the seen rates, decide either way; None: no number would.

    The smaller of what bounds the loss below `margin` and what makes it significant among `tests` tests.
    """
    if n == 0:
        return standalone_items(margin, alpha)
    significant = items_for_significance(lost, won, n, alpha / tests)
    candidates = [total for total in (_items_for_bound(lost, won, n, margin, alpha), significant) if total is not None]
    return max(1, min(candidates) - n) if candidates else None


def items_for_significance(more: float, fewer: float, n: int, alpha: float = 0.05) -> int | None:
    """Items in all at which `more` over `fewer`, at the seen rates, is significant (normal approximation)."""
    excess = more - fewer
    if excess <= 0:
        return None
    z = _z(alpha)
    total = math.ceil(n * z * z * (more + fewer) / (excess * excess))
    return total if total <= MOST_ITEMS else None


def _z(tail: float) -> float:
    return -NormalDist().inv_cdf(tail)


def _items_for_bound(lost: float, won: float, n: int, margin: float, alpha: float) -> int | None:
    def below(total: int) -> bool:
        return loss_upper_bound(lost * total / n, won * total / n, total, alpha) < margin

    if not below(MOST_ITEMS):
        return None
    lowest, highest = 1, MOST_ITEMS
    while lowest < highest:
        middle = (lowest + highest) // 2
        lowest, highest = (lowest, middle) if below(middle) else (middle + 1, highest)
    return highest
