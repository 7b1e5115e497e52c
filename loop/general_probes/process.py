"""Scoring that lm-eval calls by name from our task files."""

from __future__ import annotations

from typing import Any

from labeling.wording import stands_in


def contains(doc: dict[str, Any], results: list[str]) -> dict[str, float]:
    """1.0 when any accepted text stands in the answer as whole words."""
    return {"contains": float(stands_in(results[0], "|".join(doc["accept"])))}
