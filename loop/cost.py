"""What a night cost, in what this machine can tell: seconds a stage, tokens trained, the highest memory."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from loop.memory_record import MemoryOutcome, in_words


def night_cost(stage_seconds: Mapping[str, float], trainer_result: Mapping[str, Any]) -> dict[str, Any]:
    """`machine_hours` counts every stage, waiting for other systems included."""
    memory = trainer_result.get("memory")
    total = sum(stage_seconds.values())
    return {
        "seconds": round(total, 1),
        "machine_hours": round(total / 3600, 3),
        "stage_seconds": {stage: round(seconds, 1) for stage, seconds in stage_seconds.items()},
        "training_steps": trainer_result.get("steps"),
        "trained_tokens": trainer_result.get("tokens"),
        "peak_memory_bytes": trainer_result.get("peak_memory_bytes"),
        "memory": in_words(MemoryOutcome.model_validate(memory)) if memory else None,
        "device": trainer_result.get("device"),
    }
