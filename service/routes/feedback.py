"""POST /v1/feedback: a 202 only after the commit. GET /v1/feedback/{id}: what became of it."""

from __future__ import annotations

import uuid
from dataclasses import dataclass
from typing import Any

from litestar import Request, Response, get, post
from litestar.handlers import HTTPRouteHandler
from litestar.openapi.spec import OpenAPIMediaType, OpenAPIType, Operation, Parameter, RequestBody, Schema
from litestar.params import FromPath
from sqlmodel import col, select

from labeling.database import Database
from labeling.errors import InvalidInput, NotFound
from labeling.feedback_body import FeedbackBody
from labeling.tables import Feedback, ItemMember, ReviewItem
from service.auth import Caller, Scope
from service.feedback_desk import FeedbackDesk
from service.feedback_form import LINES, read_lines, read_one
from service.transfer.reading import ELSEWHERE, LANGFUSE, TENSORZERO

TRUTHS = {"true": True, "1": True, "": True, "false": False, "0": False}


class UnknownFeedback(NotFound):
    code = "unknown_feedback"
    default_hint = "Ids come with the 202 of POST /v1/feedback."


class BadQuery(InvalidInput):
    code = "bad_query"
    default_hint = "Send ?dry_run=true, or leave it out."


@dataclass
class _BodySchema(Schema):
    """Pydantic's own schema: the body is decoded by us, so that every mistake in it is reported at once."""

    def to_schema(self) -> dict[str, Any]:
        schema = FeedbackBody.model_json_schema()
        kinds = schema.pop("$defs")["FeedbackKind"]
        schema["properties"]["kind"] = kinds
        return {"oneOf": [schema, {"type": "array", "items": schema}]}


@dataclass
class _FeedbackOperation(Operation):
    def __post_init__(self) -> None:
        lines = OpenAPIMediaType(schema=Schema(description="One feedback a line"))
        json = OpenAPIMediaType(schema=_BodySchema())
        self.request_body = RequestBody(content={"application/json": json, "application/x-ndjson": lines})
        self.parameters = [
            Parameter(
                "dry_run", "query", schema=Schema(type=OpenAPIType.BOOLEAN), description="Check it, store nothing"
            ),
            Parameter(
                "Idempotency-Key",
                "header",
                schema=Schema(type=OpenAPIType.STRING),
                description="To send it again safely",
            ),
        ]


def feedback_routes(database: Database, desk: FeedbackDesk) -> list[HTTPRouteHandler]:
    @post(
        "/v1/feedback",
        status_code=202,
        operation_class=_FeedbackOperation,
        tags=["feedback"],
        summary="Say what an answer, or many of them, were like",
    )
    async def send_feedback(request: Request[Any, Any, Any]) -> Response[dict[str, Any]]:
        in_lines = request.headers.get("content-type", "").partition(";")[0].strip().lower() in LINES
        sent = await desk.received(request, "feedback lines" if in_lines else "feedback")
        rehearsal = _dry_run(request.query_params.get("dry_run", "false"))
        found = read_lines(sent.raw) if in_lines else read_one(sent.raw)
        if isinstance(found, list):
            answer = await (desk.rehearse_many if rehearsal else desk.take_many)(sent, found)
        else:
            answer = await (desk.rehearse if rehearsal else desk.take)(sent, found)
        return Response(answer.body, status_code=answer.status)

    @get("/v1/feedback/{feedback_id:str}", tags=["feedback"], summary="What became of a feedback")
    async def show_feedback(request: Request[Any, Any, Any], feedback_id: FromPath[str]) -> dict[str, Any]:
        caller = desk.keys.authenticate(request.headers.get("authorization"))
        if not caller.may(Scope.READ):
            caller.require(Scope.FEEDBACK)
        return await _status(database, feedback_id, caller)

    return [send_feedback, show_feedback]


def _dry_run(value: str) -> bool:
    if value.lower() not in TRUTHS:
        raise BadQuery(f"dry_run is neither true nor false: {value[:40]!r}")
    return TRUTHS[value.lower()]


async def _status(database: Database, feedback_id: str, caller: Caller) -> dict[str, Any]:
    statement = (
        select(Feedback, ReviewItem)
        .join(ItemMember, col(ItemMember.feedback_id) == col(Feedback.id), isouter=True)
        .join(ReviewItem, col(ReviewItem.id) == col(ItemMember.item_id), isouter=True)
        .where(col(Feedback.id).in_(names := _names(feedback_id)))
    )
    async with database.read() as session:
        rows = {row[0].id: row for row in await session.execute(statement) if caller.sees(row[0].project)}
    if not rows:
        raise UnknownFeedback(f"no feedback {feedback_id!r}")
    feedback, item = next(rows[one] for one in names if one in rows)
    return {
        "id": feedback.id,
        "project": feedback.project,
        "kind": feedback.kind,
        "linked": feedback.exchange_id is not None,
        "created_at": feedback.created_at,
        "folded_at": feedback.folded_at,
        "item": {"id": item.id, "round": item.round, "state": item.state, "count": item.count} if item else None,
    }


def _names(given: str) -> list[str]:
    """Ids that may be meant, the likeliest first: POST /feedback answers with a UUID, and an imported one is known to
    its source by an id without our prefix.
    """
    try:
        ours = f"fb_{uuid.UUID(given).hex}"
    except ValueError:
        ours = given
    return [given, ours, *(f"{prefix}{given}" for prefix in (TENSORZERO, LANGFUSE, ELSEWHERE))]
