"""What a night cost, in what was measured: seconds a stage, GPU minutes, energy, and money at the configured rates.

What was not measured is None, all the way up: no energy without a power sensor, no money without a rate or a quantity.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from loop.memory_record import MemoryOutcome, in_words
from loop.watch.settings import CostSettings


def night_cost(
    stage_seconds: Mapping[str, float],
    trainer_result: Mapping[str, Any],
    watched: Mapping[str, Any],
    *,
    rates: CostSettings,
    engine_on_gpu: bool,
    labels: int,
    fixed: int,
) -> dict[str, Any]:
    """`machine_hours` counts every stage, waiting for other systems included; energy is the training's.

    `engine_on_gpu`: the exam had an engine of its own on a GPU. `fixed`: flagged prompts that are right now and were
    wrong.
    """
    memory = trainer_result.get("memory")
    total = sum(stage_seconds.values())
    gpu_minutes = _gpu_minutes(watched, stage_seconds.get("evaluate", 0.0) if engine_on_gpu else 0.0)
    energy_wh = watched.get("energy_wh")
    spent = {"gpu_minutes": gpu_minutes, "energy_wh": energy_wh, "money": _money(gpu_minutes, energy_wh, rates)}
    return {
        "seconds": round(total, 1),
        "machine_hours": round(total / 3600, 3),
        "stage_seconds": {stage: round(seconds, 1) for stage, seconds in stage_seconds.items()},
        "training_steps": trainer_result.get("steps"),
        "trained_tokens": trainer_result.get("tokens"),
        "peak_memory_bytes": trainer_result.get("peak_memory_bytes"),
        "memory": in_words(MemoryOutcome.model_validate(memory)) if memory else None,
        "device": trainer_result.get("device"),
        **spent,
        "currency": rates.currency,
        "labels": labels,
        "fixed": fixed,
        "per_label": _shares(spent, labels),
        "per_fixed": _shares(spent, fixed),
    }


def _gpu_minutes(watched: Mapping[str, Any], exam_seconds: float) -> float | None:
    """None where neither the training nor the exam was on a GPU that we know of."""
    trained = watched.get("gpu_minutes")
    if trained is None and not exam_seconds:
        return None
    return round((trained or 0.0) + exam_seconds / 60, 2)


def _money(gpu_minutes: float | None, energy_wh: float | None, rates: CostSettings) -> float | None:
    parts: list[float | None] = []
    if rates.gpu_hour is not None:
        parts.append(None if gpu_minutes is None else gpu_minutes / 60 * rates.gpu_hour)
    if rates.kwh is not None:
        parts.append(None if energy_wh is None else energy_wh / 1000 * rates.kwh)
    known = [part for part in parts if part is not None]
    return round(sum(known), 4) if known and len(known) == len(parts) else None


def _shares(spent: Mapping[str, float | None], of: int) -> dict[str, float | None]:
    """Of one label, or of one prompt that is fixed."""
    return {name: None if quantity is None or of == 0 else round(quantity / of, 5) for name, quantity in spent.items()}
