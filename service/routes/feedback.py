"""POST /v1/feedback: a 202 only after the commit. GET /v1/feedback/{id}: what became of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import msgspec
from litestar import Request, get, post
from litestar.handlers import HTTPRouteHandler
from litestar.openapi.spec import OpenAPIMediaType, Operation, RequestBody, Schema
from litestar.params import FromPath
from sqlmodel import col, select

from labeling.database import Database
from labeling.errors import InvalidInput, NotFound
from labeling.feedback_body import FeedbackBody, InvalidFeedback, parse
from labeling.tables import Feedback, ItemMember, ReviewItem
from service.auth import Caller, KeyRing, Scope
from service.ingest import IngestWriter, Once, feedback_row
from service.problems import MalformedBody

MAX_IDEMPOTENCY_KEY = 255


class UnknownFeedback(NotFound):
    code = "unknown_feedback"
    default_hint = "Ids come with the 202 of POST /v1/feedback."


class BadIdempotencyKey(InvalidInput):
    code = "bad_idempotency_key"
    default_hint = f"Send 1 to {MAX_IDEMPOTENCY_KEY} visible ASCII characters, such as a UUID."


@dataclass
class _BodySchema(Schema):
    """Pydantic's own schema: the body is decoded by us, so that every mistake in it is reported at once."""

    def to_schema(self) -> dict[str, Any]:
        schema = FeedbackBody.model_json_schema()
        kinds = schema.pop("$defs")["FeedbackKind"]
        schema["properties"]["kind"] = kinds
        return schema


@dataclass
class _FeedbackOperation(Operation):
    def __post_init__(self) -> None:
        self.request_body = RequestBody(content={"application/json": OpenAPIMediaType(schema=_BodySchema())})


def feedback_routes(
    database: Database, ingest: IngestWriter, keys: KeyRing, projects: tuple[str, ...]
) -> list[HTTPRouteHandler]:
    @post(
        "/v1/feedback",
        status_code=202,
        operation_class=_FeedbackOperation,
        tags=["feedback"],
        summary="Say what an answer was like",
    )
    async def send_feedback(request: Request[Any, Any, Any]) -> dict[str, Any]:
        caller = keys.authenticate(request.headers.get("authorization"))
        caller.require(Scope.FEEDBACK)
        raw = await request.body()
        body = _parsed(raw)
        row = feedback_row(body, _project(body, caller, projects), caller.key_id)
        return await ingest.submit(row, _once(request, caller, raw))

    @get("/v1/feedback/{feedback_id:str}", tags=["feedback"], summary="What became of a feedback")
    async def show_feedback(request: Request[Any, Any, Any], feedback_id: FromPath[str]) -> dict[str, Any]:
        caller = keys.authenticate(request.headers.get("authorization"))
        if not caller.may(Scope.READ):
            caller.require(Scope.FEEDBACK)
        return await _status(database, feedback_id, caller)

    return [send_feedback, show_feedback]


def _parsed(raw: bytes) -> FeedbackBody:
    try:
        return parse(msgspec.json.decode(raw))
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise MalformedBody(f"the body is not JSON in UTF-8: {error}") from None
    except RecursionError:
        raise MalformedBody("the body is nested too deeply") from None


def _project(body: FeedbackBody, caller: Caller, projects: tuple[str, ...]) -> str:
    """The key's; else the body's; else the only one there is."""
    if body.project is not None:
        if body.project not in projects:
            raise InvalidFeedback([{"field": "project", "message": f"no project {body.project!r}"}])
        caller.require(Scope.FEEDBACK, body.project)
        return body.project
    only = projects[0] if len(projects) == 1 else None
    if (project := caller.project or only) is None:
        message = f"this API key belongs to no project: name one of {', '.join(projects)}"
        raise InvalidFeedback([{"field": "project", "message": message}])
    return project


def _once(request: Request[Any, Any, Any], caller: Caller, body: bytes) -> Once | None:
    name = request.headers.get("idempotency-key")
    if name is None:
        return None
    if not 0 < len(name) <= MAX_IDEMPOTENCY_KEY or not (name.isascii() and name.isprintable()):
        raise BadIdempotencyKey(f"the Idempotency-Key has {len(name)} characters, or some that are not visible ASCII")
    return Once.of(caller.key_id, name, body)


async def _status(database: Database, feedback_id: str, caller: Caller) -> dict[str, Any]:
    statement = (
        select(Feedback, ReviewItem)
        .join(ItemMember, col(ItemMember.feedback_id) == col(Feedback.id), isouter=True)
        .join(ReviewItem, col(ReviewItem.id) == col(ItemMember.item_id), isouter=True)
        .where(col(Feedback.id) == feedback_id)
    )
    async with database.read() as session:
        found = (await session.execute(statement)).one_or_none()
    if found is None or not caller.sees(found[0].project):
        raise UnknownFeedback(f"no feedback {feedback_id!r}")
    feedback, item = found
    return {
        "id": feedback.id,
        "project": feedback.project,
        "kind": feedback.kind,
        "linked": feedback.exchange_id is not None,
        "created_at": feedback.created_at,
        "folded_at": feedback.folded_at,
        "item": {"id": item.id, "round": item.round, "state": item.state, "count": item.count} if item else None,
    }
