"""POST /feedback: TensorZero's body unchanged, answered as TensorZero does: a UUID, or 400 with one `error`."""

from __future__ import annotations

import time
import uuid
from collections.abc import Mapping
from typing import Any

from litestar import Request, Response, post
from litestar.handlers import HTTPRouteHandler

from labeling.errors import InvalidInput, NightschoolError
from labeling.settings import MetricSettings
from labeling.tensorzero import is_dry_run, translated
from service.feedback_desk import FeedbackDesk, Sent
from service.feedback_form import checked, decoded
from service.idempotency import Answer
from service.ingest import Submission
from service.problems import headers_of, status_of


def tensorzero_routes(
    desk: FeedbackDesk, metrics: Mapping[str, Mapping[str, MetricSettings]]
) -> list[HTTPRouteHandler]:
    """`metrics`: of each project."""

    @post("/feedback", status_code=200, tags=["feedback"], summary="Feedback in TensorZero's form")
    async def send_feedback(request: Request[Any, Any, Any]) -> Response[dict[str, Any]]:
        try:
            answer = await _taken(desk, metrics, await desk.received(request, "tensorzero feedback"))
        except NightschoolError as error:
            return _refused(error)
        return Response(answer.body, status_code=answer.status)

    return [send_feedback]


async def _taken(desk: FeedbackDesk, metrics: Mapping[str, Mapping[str, MetricSettings]], sent: Sent) -> Answer:
    raw = decoded(sent.raw)
    project = desk.project_of(sent.caller, None)
    row = desk.row(sent, checked({**translated(raw, metrics[project]), "project": project}))
    named = uuid7()
    row.id = f"fb_{named.hex}"
    answer = Answer(200, {"feedback_id": str(named)})
    if is_dry_run(raw):
        return answer
    return await desk.ingest.submit(Submission([row], sent.once, len(sent.raw), lambda _: answer))


def uuid7() -> uuid.UUID:
    """RFC 9562: milliseconds, then random bits; sorts by time."""
    milliseconds = (time.time_ns() // 1_000_000) << 80
    random = uuid.uuid4().int & ((1 << 80) - 1)
    bits = milliseconds | random
    return uuid.UUID(int=bits & ~(0xF << 76) & ~(0x3 << 62) | (0x7 << 76) | (0x2 << 62))


def _refused(error: NightschoolError) -> Response[dict[str, Any]]:
    status = status_of(type(error))
    if isinstance(error, InvalidInput) and status == 422:
        status = 400
    message = f"{str(error).rstrip('.')}. {error.hint}".strip()
    return Response({"error": message}, status_code=status, headers=headers_of(error))
