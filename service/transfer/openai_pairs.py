"""Logged requests with their answers, as OpenAI's API has them, and bare conversations as fine-tuning files hold them.

A pair is {"request", "response"}, beside it, where known, request_id, session_id, latency_ms and created_at; a batch's
{"custom_id", "response": {"body"}} with its request's body counts too.
"""

from __future__ import annotations

from typing import Any

import msgspec

from labeling.tables import Exchange, Feedback
from service.capture import Captured, NotRecordable, exchange_of
from service.transfer.conversation import split_conversation
from service.transfer.reading import LineRefused, Options, Row, completion_of, exchange, exchange_id, name, when


def fits(row: Row) -> bool:
    return row.keys() >= {"request", "response"} or isinstance(row.get("messages"), list)


def read(row: Row, options: Options) -> list[Exchange | Feedback]:
    if not row.keys() >= {"request", "response"}:
        return [_conversation(row, options)]
    return [_pair(row, _body(row, "request"), _body(row, "response"), options)]


def _body(row: Row, key: str) -> Row:
    found = row[key]
    if isinstance(found, dict) and isinstance(found.get("body"), dict):
        found = found["body"]
    if not isinstance(found, dict):
        raise LineRefused(f"{key} must be an object")
    if key == "response" and (found.get("error") or not isinstance(found.get("choices"), list)):
        raise LineRefused("the response is an error, or has no choices")
    return found


def _pair(row: Row, request: Row, response: Row, options: Options) -> Exchange:
    metadata = request["metadata"] if isinstance(request.get("metadata"), dict) else {}
    session = row.get("session_id") or metadata.get("session_id")
    latency = row.get("latency_ms") or 0
    if not isinstance(latency, int | float) or latency < 0:
        raise LineRefused("latency_ms must be a number of milliseconds")
    captured = Captured(
        project=options.project,
        completion_id=name(response.get("id"), "response.id") or completion_of(options.project, request, response),
        served=name(response.get("model") or request.get("model"), "model") or "unknown",
        request=msgspec.json.encode(request),
        response=msgspec.json.encode(response),
        streamed=False,
        aborted=False,
        latency_ms=float(latency),
        request_id=name(row.get("request_id") or row.get("custom_id"), "request_id"),
        session_id=name(session, "session_id"),
        key_id="",
    )
    try:
        found = exchange_of(captured)
    except NotRecordable:
        raise LineRefused("the request has no messages and not one prompt") from None
    except (LookupError, TypeError, AttributeError):
        raise LineRefused("the response's choices are not OpenAI's") from None
    if not any(answer.strip() for answer in found.answers):
        raise LineRefused("it has no answer")
    found.key_id = None
    made: Any = when(row.get("created_at"), row.get("timestamp"), response.get("created"))
    if made is not None:
        found.created_at = made
    found.id = exchange_id(found.project, found.completion_id, found.created_at)
    return found


def _conversation(row: Row, options: Options) -> Exchange:
    messages, answer = split_conversation(row["messages"])
    return exchange(
        options,
        answer,
        completion_id=name(row.get("id"), "id") or completion_of(options.project, row),
        request_id=name(row.get("request_id"), "request_id"),
        session_id=name(row.get("session_id"), "session_id"),
        served=name(row.get("model"), "model") or "unknown",
        messages=messages,
        parameters={"tools": row["tools"]} if row.get("tools") else {},
        created_at=when(row.get("created_at"), row.get("timestamp"), row.get("created")),
    )
