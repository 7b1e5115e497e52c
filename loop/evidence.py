"""Evidence: the row that a promotion must be able to show, and the hash that ties it to what was measured."""

from __future__ import annotations

from typing import Any

from labeling.database import Database
from loop.digests import digest_json
from loop.outputs import Evaluated
from loop.report import NightFacts, summary
from loop.tables import Evidence

NOT_HASHED = {"hash", "report", "created_at"}


def build_evidence(facts: NightFacts, report: str) -> Evidence:
    evaluated: Evaluated = facts.evaluated
    columns: dict[str, Any] = {
        "night_id": facts.night_id,
        "adapter": facts.registered.adapter,
        "adapter_digest": facts.adapter_digest,
        "current": evaluated.current,
        "current_digest": evaluated.current_digest,
        "base_digest": facts.base_digest,
        "data_digest": facts.delta.digest,
        "tasks_digest": evaluated.tasks_digest,
        "passed": facts.verdict.passed,
        "decision": facts.verdict.state.value,
        "summary": summary(facts),
        "probe": evaluated.probe,
    }
    return Evidence(**columns, hash=digest_json(columns), report=report)


def evidence_hash(evidence: Evidence) -> str:
    """What the hash must be: equal to the column unless somebody changed the row."""
    return digest_json(evidence.model_dump(mode="json", exclude=NOT_HASHED))


def is_genuine(evidence: Evidence) -> bool:
    return evidence.hash == evidence_hash(evidence)


async def keep_evidence(database: Database, evidence: Evidence) -> None:
    """One row a night: the same again changes nothing, a night examined anew replaces it."""
    async with database.write() as session:
        await session.merge(evidence)
