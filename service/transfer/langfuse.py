"""Langfuse's scores, observations and traces: of its API (camelCase) and of its blob storage export (snake_case).

A generation becomes an exchange: the observation is the completion, the trace the app's request, the session the
session. Numeric and boolean scores become ratings, categories and texts comments, corrections corrections.
"""

from __future__ import annotations

import re
from typing import Any

from labeling.tables import Exchange, Feedback, FeedbackKind
from service.transfer.conversation import answer_of, prompt_of
from service.transfer.reading import (
    LANGFUSE,
    LineRefused,
    Options,
    Row,
    as_text,
    decoded,
    exchange,
    feedback,
    name,
    needed,
    rating,
    texts,
    when,
)

SCORE = {"id", "name", "source"}
OBSERVATION = {"id", "traceId", "type"}
TRACE = {"id", "timestamp", "userId"}
_WORD = re.compile(r"_([a-z])")


def fits(row: Row) -> bool:
    keys = {_camel(key) for key in row}
    return _is_score(keys) or keys >= OBSERVATION or keys >= TRACE


def read(row: Row, options: Options) -> list[Exchange | Feedback]:
    """[]: left out, as are spans and events, which no model answered."""
    row = {_camel(key): value for key, value in row.items()}
    if _is_score(set(row)):
        return _score(row, options)
    if row.keys() >= OBSERVATION:
        return _observation(row, options, row.get("sessionId"))
    return _trace(row, options)


def _is_score(keys: set[str]) -> bool:
    return keys >= SCORE and bool({"value", "stringValue", "dataType"} & keys)


def _camel(key: str) -> str:
    return _WORD.sub(lambda found: found[1].upper(), key)


def _trace(row: Row, options: Options) -> list[Exchange | Feedback]:
    """With its observations and scores where they are inside; alone, its own input and output are the exchange."""
    inside = [item for item in row.get("observations") or () if isinstance(item, dict)]
    scores = [item for item in row.get("scores") or () if isinstance(item, dict)]
    rows: list[Exchange | Feedback] = []
    for item in inside:
        rows += _observation({_camel(key): value for key, value in item.items()}, options, row.get("sessionId"))
    if not rows and row.get("input") and row.get("output"):
        identity = needed(row, "id")
        rows.append(
            exchange(
                options,
                answer_of(row["output"]),
                completion_id=identity,
                request_id=identity,
                session_id=name(row.get("sessionId"), "sessionId"),
                served=name(row.get("name"), "name") or "unknown",
                messages=prompt_of(row["input"]),
                parameters={},
                latency_ms=float(row.get("latency") or 0) * 1000,
                created_at=when(row.get("timestamp"), row.get("createdAt")),
            )
        )
    for item in scores:
        rows += _score({_camel(key): value for key, value in item.items()}, options)
    return rows


def _observation(row: Row, options: Options, session: Any) -> list[Exchange | Feedback]:
    if row.get("type") != "GENERATION":
        return []
    started, ended = when(row.get("startTime"), row.get("createdAt")), when(row.get("endTime"))
    parameters = decoded(row.get("modelParameters"))
    return [
        exchange(
            options,
            answer_of(row.get("output")),
            completion_id=needed(row, "id"),
            request_id=name(row.get("traceId"), "traceId"),
            session_id=name(session, "sessionId"),
            served=next((str(row[k]) for k in ("model", "providedModelName") if row.get(k)), "unknown"),
            messages=prompt_of(row.get("input")),
            parameters=parameters if isinstance(parameters, dict) else {},
            latency_ms=(ended - started).total_seconds() * 1000 if started and ended else 0.0,
            created_at=started,
        )
    ]


def _score(row: Row, options: Options) -> list[Exchange | Feedback]:
    called = needed(row, "name")
    if called in options.skip:
        return []
    kind = row.get("dataType") or ("CATEGORICAL" if isinstance(row.get("value"), str) else "NUMERIC")
    said = row.get("stringValue") or (row["value"] if isinstance(row.get("value"), str) else None)
    comment = row.get("comment") or None
    common: dict[str, Any] = {
        "id": f"{LANGFUSE}{needed(row, 'id')}",
        "tags": {"score": called, "source": str(row["source"]), **texts(row.get("metadata"))},
        "reporter": name(row.get("authorUserId"), "authorUserId"),
        "created_at": when(row.get("timestamp"), row.get("createdAt")),
        **_target(row),
    }
    match kind:
        case "CORRECTION":
            if not isinstance(said, str) or not said.strip():
                raise LineRefused("a correction without text")
            common |= {"comment": _text(comment)}
            return [feedback(options, FeedbackKind.CORRECTION, value=_corrected(said), **common)]
        case "CATEGORICAL" | "TEXT" if called not in options.scales:
            if not said:
                raise LineRefused(f"score {called!r} has no text")
            whole = f"{called}: {said}" if kind == "CATEGORICAL" else str(said)
            whole = f"{whole}\n{comment}" if comment else whole
            return [feedback(options, FeedbackKind.COMMENT, comment=whole, **common)]
    value = rating(row.get("value"), called, options)
    return [feedback(options, FeedbackKind.RATING, value=value, comment=_text(comment), **common)]


def _target(row: Row) -> dict[str, str | None]:
    """The most exact of what it names. A trace's score is of the trace's last generation."""
    for key, column in (("observationId", "completion_id"), ("traceId", "request_id"), ("sessionId", "session_id")):
        if (found := name(row.get(key), key)) is not None:
            return {column: found}
    raise LineRefused("it names no observation, trace or session")


def _corrected(said: str) -> str:
    try:
        return answer_of(said)
    except LineRefused:
        return said


def _text(value: Any) -> str | None:
    return None if value is None else as_text(value)
