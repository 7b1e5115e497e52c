"""Accepted labels as rows for people and for trainers: what was chosen over what, who said so, when, and how many."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from sqlmodel import col, select

from labeling.database import Database
from labeling.tables import Label, LabelState


async def accepted_labels(database: Database, project: str, after: str = "", limit: int = 1000) -> list[dict[str, Any]]:
    """In the order of their ids, from the one behind `after` on."""
    async with database.read() as session:
        rows = await session.execute(
            select(Label)
            .where(col(Label.project) == project, col(Label.state) == LabelState.ACCEPTED, col(Label.id) > after)
            .order_by(col(Label.id))
            .limit(limit)
        )
        return [label_view(label) for label in rows.scalars()]


def label_view(label: Label) -> dict[str, Any]:
    """`chosen` is None where the verdict was that the answer is good, or that nobody can tell."""
    return {
        "id": label.id,
        "prompt": label.messages,
        "verdict": label.verdict,
        "chosen": label.correction,
        "rejected": label.rejected,
        "must_contain": label.must_contain,
        "held_out": label.held_out,
        "annotators": label.annotators,
        "overlap": label.overlap,
        "accepted_at": label.accepted_at,
    }


def preference_pairs(label: Label) -> Iterator[dict[str, Any]]:
    """{prompt, chosen, rejected} with messages, as DPO and ORPO trainers take them: one for each answer beaten."""
    if label.correction is None:
        return
    for rejected in label.rejected:
        yield {
            "id": label.id,
            "prompt": label.messages,
            "chosen": [{"role": "assistant", "content": label.correction}],
            "rejected": [{"role": "assistant", "content": rejected}],
        }
