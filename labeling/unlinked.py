"""Feedback that names an exchange which is not here: kept, linked should it still come, and shown meanwhile."""

from __future__ import annotations

from typing import Any

from sqlalchemy import ColumnElement, and_, func, text
from sqlmodel import col, select

from labeling.database import Database, now
from labeling.tables import UNLINKED, Feedback


async def unlinked_feedback(database: Database, project: str, limit: int) -> dict[str, Any]:
    """{"total", "feedback"}: how many, and the oldest of them with what they named and their age in seconds."""
    rows = select(Feedback).where(_unlinked(project)).order_by(col(Feedback.created_at), col(Feedback.id)).limit(limit)
    async with database.read() as session:
        total = (await session.execute(select(func.count()).where(_unlinked(project)))).scalar_one()
        found = (await session.execute(rows)).scalars().all()
    return {"total": total, "feedback": [_view(row) for row in found]}


def _unlinked(project: str) -> ColumnElement[bool]:
    """Not what brings its own messages and answer: that needs no exchange."""
    return and_(text(UNLINKED), col(Feedback.project) == project)


def _view(row: Feedback) -> dict[str, Any]:
    named = {"exchange_id": row.completion_id, "request_id": row.request_id, "session_id": row.session_id}
    return {
        "id": row.id,
        "kind": row.kind,
        "named": {key: value for key, value in named.items() if value is not None},
        "created_at": row.created_at,
        "age_seconds": round((now() - row.created_at).total_seconds()),
        "reasons": row.reasons,
        "comment": row.comment,
        "key_id": row.key_id,
    }
