"""Which item a labeller sees next: severity x uncertainty x novelty x traffic, each from 0 to 1.

What is not known of an item counts as middling. A share of the items, drawn by hash of their id, take a place by lot
instead: what they show when labelled is what everything would have shown, and the others are compared with them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from labeling.draws import drawn, in_share
from labeling.settings import SelectionSettings
from labeling.tables import Chosen, ReviewItem

FLOOR = 0.1  # of each factor but traffic: the least urgent item still counts, and no factor alone decides everything
MIDDLING = 0.5
HALF_OF_TRAFFIC = 8  # as many reports make half of the traffic factor's range


@dataclass(frozen=True)
class Signals:
    """What is known of an item; 0..1 but `count`, None = not known."""

    severity: float
    count: int
    uncertainty: float | None = None
    novelty: float | None = None

    @classmethod
    def of(cls, item: ReviewItem) -> Signals:
        return cls(item.severity, item.count, item.uncertainty, item.novelty)


def factors(signals: Signals) -> dict[str, float]:
    """By name; above 0, so that the product of all orders items by each of them."""
    count = max(signals.count, 1)
    return {
        "severity": _factor(signals.severity),
        "uncertainty": _factor(signals.uncertainty),
        "novelty": _factor(signals.novelty),
        "traffic": round(count / (count + HALF_OF_TRAFFIC), 4),
    }


def _factor(value: float | None) -> float:
    return round(FLOOR + (1 - FLOOR) * (MIDDLING if value is None else min(max(value, 0.0), 1.0)), 4)


def score(found: dict[str, float], settings: SelectionSettings) -> float:
    """Their weighted geometric mean: the order of the product, spread over 0..1."""
    weights = {name: float(getattr(settings, name)) for name in found}
    total = sum(weights.values())
    if total == 0:
        return MIDDLING
    product = 1.0
    for name, factor in found.items():
        product *= factor ** (weights[name] / total)
    return round(product, 4)


def chosen(item_id: str, settings: SelectionSettings) -> Chosen:
    return Chosen.RANDOM if in_share(f"random slice: {item_id}", settings.random_share) else Chosen.SCORE


def place(item: ReviewItem, settings: SelectionSettings, others: Sequence[float] = ()) -> None:
    """Sets `factors` and `score`. `others`: scores of recent items, sorted, among which lots are drawn.

    A lot is a rank, so that as large a part of the random slice as of the rest is labelled, however deep people get.
    """
    item.factors = factors(Signals.of(item))
    if item.chosen is Chosen.SCORE:
        item.score = score(item.factors, settings)
        return
    lot = drawn(f"lot: {item.id}")
    if others:
        item.score = others[int(lot * len(others))]
    elif item.scored_at is None:
        item.score = round(lot, 4)
