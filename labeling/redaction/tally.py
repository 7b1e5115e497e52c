"""How many places were replaced since this process began, by project and kind: numbers only, never what stood there."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

REPLACED: Counter[tuple[str, str]] = Counter()


def count_replaced(project: str, counts: Mapping[str, int]) -> None:
    for kind, places in counts.items():
        REPLACED[project, kind] += places
