"""Bytes of a feedback request into checked bodies: one JSON object, a JSON array, or lines of JSON (NDJSON)."""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import msgspec

from labeling.errors import InvalidInput, NightschoolError
from labeling.feedback_body import FeedbackBody, parse
from service.problems import BodyTooLarge, MalformedBody, UnknownEncoding

LINES = frozenset({"application/x-ndjson", "application/ndjson", "application/jsonl", "application/x-jsonlines"})
MOST_ROWS = 10_000  # of one request: its rows are one transaction


class TooManyRows(BodyTooLarge):
    code = "too_many_rows"
    default_hint = f"Send at most {MOST_ROWS} feedback a request, or raise http.ingest_queue where that is less."


class NoFeedback(InvalidInput):
    code = "no_feedback"
    default_hint = "Send one JSON object, an array of them, or one a line."


@dataclass(frozen=True)
class Line:
    """One feedback of many: `number` counts lines (or places in the array) from 1."""

    number: int
    body: FeedbackBody | None
    mistake: NightschoolError | None = None


def decompressed(raw: bytes, encoding: str, limit: int) -> bytes:
    """By Content-Encoding. Stops at the limit, however much more the bytes would become."""
    match encoding.strip().lower():
        case "" | "identity":
            return raw
        case "gzip" | "x-gzip":
            return _gunzipped(raw, limit)
    raise UnknownEncoding(f"Content-Encoding {encoding[:40]!r} is not understood")


def _gunzipped(raw: bytes, limit: int) -> bytes:
    parts: list[bytes] = []
    room = limit
    while raw:  # a gzip file may be several, one after another
        unpacking = zlib.decompressobj(wbits=16 + zlib.MAX_WBITS)
        try:
            parts.append(unpacking.decompress(raw, room + 1))
        except zlib.error as error:
            raise MalformedBody(f"the body is not gzip: {error}") from None
        room -= len(parts[-1])
        if room < 0:
            raise BodyTooLarge(f"the body becomes more than {limit} bytes")
        if not unpacking.eof:
            raise MalformedBody("the gzip body ends too early")
        raw = unpacking.unused_data
    return b"".join(parts)


def read_one(raw: bytes) -> FeedbackBody | list[Line]:
    """A JSON object is one feedback; an array is many, of which each may have its own mistakes."""
    value = decoded(raw)
    if isinstance(value, list):
        return [_line(number, item) for number, item in enumerate(_few(value), 1)]
    return checked(value)


def read_lines(raw: bytes) -> list[Line]:
    """NDJSON; blank lines count, and are passed over."""
    return list(_lines(_few([(n, line) for n, line in enumerate(raw.split(b"\n"), 1) if line.strip()])))


def _lines(numbered: list[tuple[int, bytes]]) -> Iterator[Line]:
    for number, line in numbered:
        try:
            yield _line(number, decoded(line))
        except MalformedBody as error:
            yield Line(number, None, error)


def _line(number: int, value: Any) -> Line:
    try:
        return Line(number, checked(value))
    except NightschoolError as error:
        return Line(number, None, error)


def checked(value: Any) -> FeedbackBody:
    try:
        return parse(value)
    except RecursionError:
        raise MalformedBody("the body is nested too deeply") from None


def _few(found: list[Any]) -> list[Any]:
    if not found:
        raise NoFeedback("the body holds no feedback")
    if len(found) > MOST_ROWS:
        raise TooManyRows(f"the body holds {len(found)} feedback")
    return found


def decoded(raw: bytes) -> Any:
    try:
        return msgspec.json.decode(raw)
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise MalformedBody(f"the body is not JSON in UTF-8: {error}") from None
    except RecursionError:
        raise MalformedBody("the body is nested too deeply") from None
