"""What a night cost, in what this machine can tell: seconds a stage, tokens trained, the highest memory."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def night_cost(stage_seconds: Mapping[str, float], trainer_result: Mapping[str, Any]) -> dict[str, Any]:
    """`machine_hours` counts every stage, waiting for other systems included."""
    total = sum(stage_seconds.values())
    return {
        "seconds": round(total, 1),
        "machine_hours": round(total / 3600, 3),
        "stage_seconds": {stage: round(seconds, 1) for stage, seconds in stage_seconds.items()},
        "training_steps": trainer_result.get("steps"),
        "trained_tokens": trainer_result.get("tokens"),
        "peak_memory_bytes": trainer_result.get("peak_memory_bytes"),
        "device": trainer_result.get("device"),
    }
