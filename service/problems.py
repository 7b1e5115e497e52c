"""Errors as RFC 9457 problems (`application/problem+json`): one table from class to status, used by every route.

The OpenAI-compatible routes answer in OpenAI's form instead: `service.gateway`.
"""

from __future__ import annotations

import http
from typing import Any

import structlog
from litestar import Request, Response
from litestar.exceptions import HTTPException
from litestar.types import ExceptionHandlersMap

from labeling.errors import Conflict, InvalidInput, NightschoolError, NotFound, Refused, Unavailable
from service.auth import Unauthenticated

log = structlog.get_logger(__name__)
MEDIA_TYPE = "application/problem+json"


class MalformedBody(InvalidInput):
    code = "malformed_body"
    default_hint = "Send one JSON object, in UTF-8, with Content-Type: application/json."


class BodyTooLarge(InvalidInput):
    code = "body_too_large"
    default_hint = "Send less, or raise http.max_body_bytes."


class UnknownEncoding(InvalidInput):
    code = "unknown_encoding"
    default_hint = "Send the body as it is, or with Content-Encoding: gzip."


# The nearest class in an error's ancestry decides.
STATUS: dict[type[NightschoolError], int] = {
    NightschoolError: 500,
    InvalidInput: 422,
    MalformedBody: 400,
    BodyTooLarge: 413,
    UnknownEncoding: 415,
    NotFound: 404,
    Conflict: 409,
    Refused: 403,
    Unauthenticated: 401,
    Unavailable: 503,
}


def status_of(kind: type[BaseException]) -> int:
    return next(STATUS[ancestor] for ancestor in kind.__mro__ if ancestor in STATUS)


def headers_of(error: NightschoolError) -> dict[str, str]:
    if isinstance(error, Unavailable):
        return {"Retry-After": str(error.retry_after_seconds)}
    return {"WWW-Authenticate": "Bearer"} if isinstance(error, Unauthenticated) else {}


def problem(status: int, code: str, detail: str, *, hint: str = "", **extra: Any) -> dict[str, Any]:
    body = {"type": "about:blank", "title": http.HTTPStatus(status).phrase, "status": status, "code": code}
    return {**body, "detail": detail, **({"hint": hint} if hint else {}), **extra}


def _answer(body: dict[str, Any], headers: dict[str, str] | None = None) -> Response[Any]:
    return Response(body, status_code=body["status"], media_type=MEDIA_TYPE, headers=headers or {})


def problem_of(error: NightschoolError) -> dict[str, Any]:
    mistakes = getattr(error, "mistakes", None)
    extra: dict[str, Any] = {"errors": mistakes} if mistakes else {}
    return problem(status_of(type(error)), error.code, str(error), hint=error.hint, **extra)


def _ours(request: Request[Any, Any, Any], error: NightschoolError) -> Response[Any]:
    body = problem_of(error)
    if body["status"] >= 500:
        log.warning("request_refused", path=request.url.path, code=error.code, error=str(error))
    return _answer(body, headers_of(error))


def _framework(_: Request[Any, Any, Any], error: HTTPException) -> Response[Any]:
    extra: dict[str, Any] = {"errors": error.extra} if error.extra else {}
    code = http.HTTPStatus(error.status_code).name.lower()
    return _answer(problem(error.status_code, code, error.detail, **extra), dict(error.headers or {}))


def _unforeseen(request: Request[Any, Any, Any], error: Exception) -> Response[Any]:
    """The request's boundary: logged whole, answered without internals."""
    log.error("request_failed", path=request.url.path, exc_info=error)
    return _answer(problem(500, "internal_error", "an error of ours; the log has its details"))


HANDLERS: ExceptionHandlersMap = {
    NightschoolError: _ours,
    HTTPException: _framework,
    Exception: _unforeseen,
}
