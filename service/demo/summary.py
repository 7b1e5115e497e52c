"""The numbers of the play as JSON: each measured from the served model; what a night lacks is null."""

from __future__ import annotations

from typing import Any

GENERAL = "task:nightschool_general"


def night_summary(night: dict[str, Any]) -> dict[str, Any]:
    """One entry of `nights` from GET /v1/nights/{id}."""
    stages = {stage["stage"]: stage["seconds"] for stage in night["stages"]}
    evaluated = night["outputs"].get("evaluate")
    delta = night["outputs"].get("build_delta") or {}
    registered = night["outputs"].get("register") or {}
    trained = night["outputs"].get("train") or {}
    families = {family["name"]: family for family in evaluated["families"]} if evaluated else {}
    return {
        "decision": night["state"],
        "reason": night["reason"],
        "labels": delta.get("label_rows"),
        "examples": sum(delta[key] for key in ("label_rows", "replay_rows", "base_rows")) if delta else None,
        "fix_rate": {name: _fix_rate(families.get(name)) for name in ("trained", "held_out")},
        "general": _general(families.get(GENERAL)),
        "regressions": sum(family["lost"] for family in families.values()) if families else None,
        "adapter": registered.get("adapter"),
        "adapter_digest": trained.get("adapter_digest"),
        "mlflow_version": str(registered["version"]) if registered else None,
        "stage_seconds": stages,
        "cost": {
            "wall_seconds": round(sum(stages.values()), 1),
            "training_seconds": trained.get("result", {}).get("seconds"),
            "training_tokens": trained.get("result", {}).get("tokens"),
            "peak_memory_bytes": trained.get("result", {}).get("peak_memory_bytes"),
        },
    }


def _fix_rate(family: dict[str, Any] | None) -> dict[str, Any] | None:
    return family and {"before": family["current"], "after": family["candidate"], "n": family["n"]}


def _general(family: dict[str, Any] | None) -> dict[str, Any] | None:
    return family and {key: family[key] for key in ("base", "current", "candidate", "n", "lost")}
