"""A night, and a project, as JSON: what the API, `night show` and the pages tell."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from sqlalchemy import func
from sqlalchemy.ext.asyncio import AsyncSession
from sqlmodel import col, select

from labeling.database import Database
from labeling.errors import NotFound
from labeling.tables import GoodAnswer, Label, LabellingProject, LabelState, ReviewItem
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

AT_WORK = (NightState.CLAIMED, NightState.RUNNING, NightState.PROMOTING)


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
    """Labels and thumbs that a REJECTED night trained on, with what they say, for a person to look at."""
    async with database.read() as session:
        rows = await session.execute(
            select(Label, LabelUse.night_id)
            .join(LabelUse, col(LabelUse.label_id) == col(Label.id))
            .where(col(LabelUse.held).is_(True), col(Label.project) == project)
            .order_by(col(Label.id))
        )
        thumbs = await _held_thumbs(session, project)
        return thumbs + [
            {
                "id": label.id,
                "night": night_id,
                "prompt": label.messages,
                "flagged_answer": label.flagged_answer,
                "correction": label.correction,
                "annotators": label.annotators,
            }
            for label, night_id in rows
        ]


async def _held_thumbs(session: AsyncSession, project: str) -> list[dict[str, Any]]:
    """`correction`: the answer that was rated up; None below a thumb down, which has none."""
    held = col(LabelUse.held).is_(True)
    good = await session.execute(
        select(GoodAnswer, LabelUse.night_id)
        .join(LabelUse, col(LabelUse.label_id) == col(GoodAnswer.id))
        .where(held, col(GoodAnswer.project) == project)
        .order_by(col(GoodAnswer.id))
    )
    bad = await session.execute(
        select(ReviewItem, LabelUse.night_id)
        .join(LabelUse, col(LabelUse.label_id) == col(ReviewItem.id))
        .where(held, col(ReviewItem.project) == project)
        .order_by(col(ReviewItem.id))
    )
    return [
        *(_held_thumb(one.id, night_id, one.messages, good=one.answer) for one, night_id in good),
        *(_held_thumb(one.id, night_id, one.messages, bad=one.answer) for one, night_id in bad),
    ]


def _held_thumb(
    name: str, night_id: str, prompt: list[dict[str, Any]], *, good: str | None = None, bad: str | None = None
) -> dict[str, Any]:
    said = {"prompt": prompt, "flagged_answer": bad, "correction": good, "annotators": []}
    return {"id": name, "night": night_id, **said}


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
