"""Which memory plan a training follows, and how earlier ones ended: `memory.json` beside its checkpoints. No torch.

The trainer writes it when it settles on a plan and lowers it after a near miss; the parent moves it on when the trainer
ran out of memory. A resumed training reads it and keeps its plan.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import ValidationError

from labeling.settings import Strict
from loop.digests import write_durably
from loop.memory_plan import Plan

RECORD = "memory.json"
NEAR_MISS = 0.95  # of the budget: a little more, of another process or a longer row, and it would not have held


class Attempt(Strict):
    """A plan that was given up. `measured_bytes` is None where the trainer died before it could tell."""

    plan: Plan
    outcome: Literal["out_of_memory", "near_miss"]
    measured_bytes: int | None = None


class MemoryRecord(Strict):
    """`plans[0]` is followed; the others are what is left below it. `machine` names the card, or host memory."""

    run_digest: str
    machine: str
    plans: tuple[Plan, ...]
    attempts: tuple[Attempt, ...] = ()
    note: str = ""


class MemoryOutcome(Strict):
    """Of a finished training: what was planned, and what it took. Estimated and measured are the same kind of bytes."""

    plan: Plan
    machine: str
    measured_bytes: int
    attempts: tuple[Attempt, ...] = ()
    note: str = ""


def read_record(out_dir: Path, run_digest: str | None = None) -> MemoryRecord | None:
    """None where there is none, or only of other rows or another recipe."""
    try:
        record = MemoryRecord.model_validate_json((out_dir / RECORD).read_bytes())
    except (FileNotFoundError, ValidationError):
        return None
    return record if run_digest in {None, record.run_digest} else None


def write_record(out_dir: Path, record: MemoryRecord) -> None:
    out_dir.mkdir(parents=True, exist_ok=True)
    write_durably(out_dir / RECORD, record.model_dump_json(indent=1).encode())


def fall_back(out_dir: Path, measured_bytes: int | None = None) -> Plan | None:
    """After running out of memory: the next plan down, written; None where there is none left."""
    record = read_record(out_dir)
    if record is None or len(record.plans) < 2:
        return None
    given_up = Attempt(plan=record.plans[0], outcome="out_of_memory", measured_bytes=measured_bytes)
    record = record.model_copy(update={"plans": record.plans[1:], "attempts": (*record.attempts, given_up)})
    write_record(out_dir, record)
    return record.plans[0]


def in_words(outcome: MemoryOutcome) -> str:
    """One line for people: "checkpointing on, 8,192 tokens at once (2 micro-batches); estimated 9.7 GiB, …"."""
    plan = outcome.plan
    parts = f", {plan.micro_batches} micro-batches for the largest" if plan.micro_batches > 1 else ""
    line = (
        f"checkpointing {plan.checkpointing}, at most {plan.micro_tokens:,} tokens at once{parts}; estimated "
        f"{gib(plan.estimated_bytes)}, measured {gib(outcome.measured_bytes)} of {gib(plan.budget_bytes)} "
        f"({outcome.machine})"
    )
    given_up = "; ".join(_given_up(attempt) for attempt in outcome.attempts)
    return f"{line}; before that {given_up}" if given_up else line


def _given_up(attempt: Attempt) -> str:
    plan = attempt.plan
    words = {"out_of_memory": "ran out of memory", "near_miss": "came too close to the budget"}[attempt.outcome]
    measured = f" at {gib(attempt.measured_bytes)}" if attempt.measured_bytes else ""
    return (
        f"checkpointing {plan.checkpointing} with {plan.micro_tokens:,} tokens ({gib(plan.estimated_bytes)} estimated) "
        f"{words}{measured}"
    )


def gib(number: float) -> str:
    return f"{number / 2**30:.1f} GiB"
