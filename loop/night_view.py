"""A night, and a project, as JSON: what the API, `night show` and the pages tell."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

from sqlalchemy import func
from sqlalchemy.ext.asyncio import AsyncSession
from sqlmodel import col, select

from labeling.database import Database
from labeling.errors import NotFound
from labeling.tables import GoodAnswer, Label, LabellingProject, LabelState, ReviewItem
from loop.states import AT_WORK
from loop.tables import (
    Evidence,
    LabelUse,
    Night,
    NightEvent,
    NightProgress,
    NightState,
    Promotion,
    Serving,
    StageMarker,
)


class UnknownNight(NotFound):
    code = "unknown_night"
    default_hint = "`nightschool night show` without an id shows the newest."


async def get_night(session: AsyncSession, night_id: str) -> Night:
    night = await session.get(Night, night_id)
    if night is None:
        raise UnknownNight(f"no night {night_id!r}")
    return night


async def newest(
    session: AsyncSession, project: str | None, states: tuple[NightState, ...] = (), limit: int = 1
) -> list[Night]:
    query = select(Night).order_by(col(Night.created_at).desc()).limit(limit)
    if project is not None:
        query = query.where(Night.project == project)
    if states:
        query = query.where(col(Night.state).in_(states))
    return list((await session.execute(query)).scalars())


async def night_view(database: Database, data_dir: Path, night_id: str, live: dict[str, Any] | None) -> dict[str, Any]:
    """State, stages with seconds and outputs, events, evidence and report; `live` is the running stage's last line.

    None here: of a worker in another process, as the database has it. An ended night has none.
    """
    async with database.read() as session:
        night = await get_night(session, night_id)
        markers = await _all(session, select(StageMarker).where(StageMarker.night_id == night_id))
        events = await _all(session, select(NightEvent).where(NightEvent.night_id == night_id))
        evidence = await session.get(Evidence, night_id)
        elsewhere = await session.get(NightProgress, night_id) if live is None and night.state in AT_WORK else None
    markers.sort(key=lambda marker: marker.finished_at)
    return {
        **night.model_dump(mode="json"),
        "stages": [
            {"stage": m.stage, "seconds": round(m.seconds, 3), "token": m.token, "digest": m.digest} for m in markers
        ],
        "outputs": {marker.stage: _output(data_dir / marker.folder) for marker in markers},
        "events": [
            {"at": event.at.isoformat(), "kind": event.kind, **event.detail}
            for event in sorted(events, key=lambda event: event.number or 0)
        ],
        "evidence": evidence and evidence.model_dump(mode="json", exclude={"report", "probe"}),
        "report": evidence.report if evidence else None,
        "live": {**elsewhere.line, "at": elsewhere.at.isoformat()} if elsewhere else live,
    }


def _output(folder: Path) -> dict[str, Any] | None:
    """None when the files were pruned or lie on another machine."""
    try:
        output: dict[str, Any] = json.loads((folder / "output.json").read_text(encoding="utf-8"))
    except OSError:
        return None
    return output


async def project_view(database: Database, project: str) -> dict[str, Any]:
    async with database.read() as session:
        serving = await session.get(Serving, project)
        labelling = await session.get(LabellingProject, project)
        items = await _counts(session, ReviewItem.state, ReviewItem.project, project, col(ReviewItem.gold_id).is_(None))
        labels = await _counts(session, Label.state, Label.project, project)
        nights = await newest(session, project, limit=10)
        promotions = await _all(
            session,
            select(Promotion).where(Promotion.project == project).order_by(col(Promotion.at).desc()).limit(10),
        )
    return {
        "project": project,
        "current": serving and serving.current,
        "previous": serving and serving.previous,
        "items": items,
        "labels": labels,
        "labelling_project": labelling and labelling.server_project,
        "nights": [night.model_dump(mode="json") for night in nights],
        "promotions": [promotion.model_dump(mode="json") for promotion in promotions],
    }


async def held_labels(database: Database, project: str) -> list[dict[str, Any]]:
    """Labels and thumbs that a REJECTED night trained on, with what they say, for a person to look at.

    `correction` of a thumb up is the answer that was rated; below a thumb down there is none.
    """
    async with database.read() as session:
        good = await _held(session, GoodAnswer, project)
        bad = await _held(session, ReviewItem, project)
        labels = await _held(session, Label, project)
    return [
        *(_held_row(one, night, correction=one.answer) for one, night in good),
        *(_held_row(one, night, flagged_answer=one.answer) for one, night in bad),
        *(
            _held_row(
                *(one, night),
                flagged_answer=one.flagged_answer,
                correction=one.correction,
                annotators=one.annotators,
            )
            for one, night in labels
        ),
    ]


Held = TypeVar("Held", GoodAnswer, ReviewItem, Label)


async def _held(session: AsyncSession, kind: type[Held], project: str) -> Sequence[tuple[Held, str]]:
    """With the night that trained on it."""
    rows = await session.execute(
        select(kind, LabelUse.night_id)
        .join(LabelUse, col(LabelUse.label_id) == col(kind.id))
        .where(col(LabelUse.held).is_(True), col(kind.project) == project)
        .order_by(col(kind.id))
    )
    return [(row, night) for row, night in rows]


def _held_row(
    row: GoodAnswer | ReviewItem | Label,
    night_id: str,
    *,
    flagged_answer: str | None = None,
    correction: str | None = None,
    annotators: Sequence[str] = (),
) -> dict[str, Any]:
    said = {"flagged_answer": flagged_answer, "correction": correction, "annotators": list(annotators)}
    return {"id": row.id, "night": night_id, "prompt": row.messages, **said}


async def refused_labels(database: Database, project: str) -> list[dict[str, Any]]:
    """Newest first, with the reason and the Label Studio task in which the annotation can be edited."""
    async with database.read() as session:
        rows = await session.execute(
            select(Label, col(ReviewItem.task_id))
            .join(ReviewItem, col(ReviewItem.id) == col(Label.item_id))
            .where(col(Label.project) == project, col(Label.state) == LabelState.REFUSED)
            .order_by(col(Label.updated_at).desc())
        )
        return [
            {
                "id": label.id,
                "task": task,
                "prompt": label.messages,
                "flagged_answer": label.flagged_answer,
                "correction": label.correction,
                "reason": label.reason,
                "annotators": label.annotators,
            }
            for label, task in rows
        ]


async def _counts(session: AsyncSession, state: Any, project_column: Any, project: str, *more: Any) -> dict[str, int]:
    rows = await session.execute(select(state, func.count()).where(project_column == project, *more).group_by(state))
    return {str(value): count for value, count in rows}


async def _all(session: AsyncSession, query: Any) -> list[Any]:
    return list((await session.execute(query)).scalars())
