"""What each stage hands on. Paths are absolute; scores are fractions 0..1 of a stated n."""

from __future__ import annotations

from typing import Any

from pydantic import Field

from loop.methods import Method
from loop.stage import StageOutput
from loop.tables import NightState


class SyncedLabels(StageOutput):
    accepted: int
    disputed: int
    refused: int
    not_in_current: int  # accepted, trainable, and not yet in the adapter that serves
    notes: tuple[str, ...] = ()  # why labels may be missing


class Delta(StageOutput):
    """`data_dir` holds train.jsonl, pairs.jsonl or thumbs.jsonl where the method trains on them, and the exam items
    trained.jsonl, earlier_fixes.jsonl, held_out.jsonl, good_answers.jsonl. Its digest covers all of them."""

    data_dir: str
    digest: str
    label_ids: tuple[str, ...]
    label_rows: int
    replay_rows: int
    base_rows: int
    held_out_items: int
    notes: tuple[str, ...] = ()  # what was left out, and why
    method: Method = "sft"
    method_why: str = ""
    pairs: int = 0
    good_thumbs: int = 0
    bad_thumbs: int = 0


class Preflight(StageOutput):
    """`warnings` stand in the report with their cures; `environment` is what the next nights are compared with."""

    spec_path: str
    base_digest: str
    template_digest: str = ""  # of the chat template in force
    checks: tuple[str, ...]
    warnings: tuple[str, ...] = ()
    environment: dict[str, str] = Field(
        default_factory=dict
    )  # driver, device, CUDA and package versions of the trainer


class Trained(StageOutput):
    adapter_dir: str
    adapter_digest: str
    result: dict[str, Any]  # the trainer's result.json
    run_id: str  # MLflow's
    seconds: float
    watched: dict[str, Any] = Field(default_factory=dict)  # alarms, energy, time on the accelerator: loop.watch.usage


class Registered(StageOutput):
    adapter: str  # support-bot@v2
    version: int
    run_id: str
    archive: str
    folder: str  # where replicas find it, as seen from here


class FamilyResult(StageOutput):
    """One family of the gate, paired per item. `rows_path` is JSONL: id, base, current, candidate (0..1), answers."""

    name: str  # trained | earlier_fixes | held_out | good_answers | task:NAME
    n: int
    base: float
    current: float
    candidate: float
    lost: int  # current right, candidate wrong
    won: int
    rows_path: str


class Evaluated(StageOutput):
    current: str
    current_digest: str
    families: tuple[FamilyResult, ...]
    tasks_digest: str
    probe: dict[str, Any]
    applied: bool  # the adapter changes log-probabilities at all
    seconds_an_answer: dict[str, float]  # median, by base / current / candidate


class Decided(StageOutput):
    state: NightState
    reason: str
    hint: str
    evidence_hash: str
    report_path: str


class Loaded(StageOutput):
    adapter: str
    replicas: tuple[str, ...]


class Probed(StageOutput):
    largest_difference: dict[str, float]  # by replica, nats a token


class Switched(StageOutput):
    from_adapter: str
    to_adapter: str
    promotion_id: str


class Drained(StageOutput):
    seconds: float
    unloaded: tuple[str, ...]
