"""What a night's report says of its training and of what it cost, in words."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

ALARMS_TOLD = 10
KEPT_AT_LEAST = 0.5  # below, less than half of what was learnt is served


def training_lines(training: Mapping[str, Any]) -> list[str]:
    """Nothing where nothing happened; `training` is the trainer's result with the watch's."""
    extracted = extraction_line(training)
    lines = [extracted] if extracted else []
    if training.get("time_limited"):
        lines.append(
            f"**limited by time**: {training['steps']} of {training['planned_steps']} planned steps, the learning rate "
            "brought down before the end; raise trainer.hours_allowed for the rest"
        )
    if training.get("roll_backs"):
        lines.append(f"rolled back {training['roll_backs']} times; learning rate x {training.get('rate_scale', 1):g}")
    if training.get("restarts"):
        lines.append(f"the trainer was started again {training['restarts']} times")
    raised = [alarm for alarm in training.get("alarms", ()) if not alarm["over"]]
    for alarm in raised[:ALARMS_TOLD]:
        at = f" at step {alarm['step']}" if alarm.get("step") else ""
        lines.append(f"alarm {alarm['kind'].replace('_', ' ')}{at} ({alarm['action']}): {alarm['message']}")
    if len(raised) > ALARMS_TOLD:
        lines.append(f"{len(raised) - ALARMS_TOLD} more alarms: the night's events have all")
    return [*lines, *training.get("notes", ())]


def extraction_line(training: Mapping[str, Any]) -> str:
    """Of a full fine-tune: how much of it the adapter is; empty for any other training."""
    kept = training.get("extraction")
    if not kept:
        return ""
    line = (
        f"full fine-tune: the adapter out of it keeps {kept['kept_share']:.0%} of the change (of its squared norm; "
        f"{kept['least_kept_share']:.0%} in {kept['least_kept_layer']})"
    )
    return f"{line}. That is little: a higher trainer.rank keeps more" if keeps_little(training) else line


def keeps_little(training: Mapping[str, Any]) -> bool:
    kept = training.get("extraction")
    return kept is not None and kept["kept_share"] < KEPT_AT_LEAST


def cost_lines(cost: Mapping[str, Any]) -> list[str]:
    """Only what is known."""
    currency = cost.get("currency", "")
    whole = _quantities(cost, currency)
    if not whole:
        return []
    lines = ["", f"Measured: {whole}."]
    for name, of, share in (("label", "labels", "per_label"), ("fixed prompt", "fixed", "per_fixed")):
        told = _quantities(cost.get(share) or {}, currency)
        if told:
            lines.append(f"A {name} ({cost[of]}): {told}.")
    return lines


def _quantities(spent: Mapping[str, Any], currency: str) -> str:
    units = {"gpu_minutes": "GPU minutes", "energy_wh": "Wh while training", "money": currency}
    return ", ".join(f"{spent[name]:.3g} {unit}" for name, unit in units.items() if spent.get(name) is not None)
