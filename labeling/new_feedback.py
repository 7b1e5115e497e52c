"""A feedback on its way into its table: the columns of `Feedback`, without the ORM's bookkeeping.

Making a `Feedback` takes longer than decoding, checking and storing what it holds.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

from labeling.answers import answer_text
from labeling.database import new_id, now
from labeling.feedback_body import FeedbackBody
from labeling.reporters import Reporters
from labeling.tables import FeedbackKind


@dataclass
class NewFeedback:
    project: str
    kind: FeedbackKind
    completion_id: str | None = None
    request_id: str | None = None
    session_id: str | None = None
    choice: int = 0
    value: Any = None
    reasons: list[str] = field(default_factory=list)
    severity: float = 0.5
    comment: str | None = None
    reporter: str | None = None
    tags: dict[str, str] = field(default_factory=dict)
    messages: list[dict[str, Any]] | None = None
    answer: str | None = None
    key_id: str | None = None
    exchange_id: str | None = None
    id: str = field(default_factory=lambda: new_id("fb"))
    created_at: datetime = field(default_factory=now)
    folded_at: datetime | None = None
    link_at: datetime | None = field(default_factory=now)


def new_feedback(body: FeedbackBody, project: str, key_id: str, reporters: Reporters) -> NewFeedback:
    return NewFeedback(
        project=project,
        kind=body.kind,
        completion_id=body.exchange_id,
        request_id=body.request_id,
        session_id=body.session_id,
        choice=body.choice,
        value=body.value,
        reasons=body.reasons,
        severity=body.severity,
        comment=body.comment,
        reporter=reporters.pseudonym(project, body.reporter),
        tags=body.tags,
        messages=body.messages,
        answer=None if body.answer is None else answer_text(body.answer),
        key_id=key_id,
    )
