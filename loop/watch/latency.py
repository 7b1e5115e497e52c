"""A latency quantile of the requests between two looks at a Prometheus histogram."""

from __future__ import annotations

import math

from prometheus_client.parser import text_string_to_metric_families

Buckets = dict[float, float]  # upper bound in seconds -> requests at or below it, since the process began


class NoSuchMetric(Exception):
    """That address shows no histogram of this name."""


class Latency:
    def __init__(self, metric: str, quantile: float, min_requests: int) -> None:
        self._metric, self._quantile, self._min = metric, quantile, min_requests
        self._last: dict[str, Buckets] = {}

    def since_last(self, source: str, text: str) -> float | None:
        """Seconds, by linear interpolation in a bucket as Prometheus' histogram_quantile does.

        None at the first look, after the source began anew, and while too few requests ended between the looks.
        """
        now = buckets(text, self._metric)
        before = self._last.get(source)
        self._last[source] = now
        if before is None:
            return None
        grown = {bound: count - before.get(bound, 0.0) for bound, count in now.items()}
        if min(grown.values()) < 0 or grown[math.inf] < self._min:
            return None
        return quantile(grown, self._quantile)


def buckets(text: str, metric: str) -> Buckets:
    """Summed over all labels but the bound (models, engines)."""
    found: Buckets = {}
    for family in text_string_to_metric_families(text):
        if family.name != metric:
            continue
        for sample in family.samples:
            if sample.name.endswith("_bucket"):
                bound = float(sample.labels["le"])
                found[bound] = found.get(bound, 0.0) + sample.value
    if math.inf not in found:
        raise NoSuchMetric(f"no histogram {metric!r}")
    return found


def quantile(counts: Buckets, share: float) -> float:
    """`counts` are cumulative. Above the last finite bound it is that bound: more is not known."""
    wanted = share * counts[math.inf]
    lower, below = 0.0, 0.0
    for bound in sorted(counts):
        if counts[bound] >= wanted:
            if math.isinf(bound):
                return lower
            inside = counts[bound] - below
            return lower + (bound - lower) * ((wanted - below) / inside if inside else 1.0)
        lower, below = bound, counts[bound]
    return lower
