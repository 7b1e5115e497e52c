"""What all source formats share: the options of an import, refusals, times and ratings."""

from __future__ import annotations

import hashlib
import uuid
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any, ClassVar

import msgspec

from labeling.errors import InvalidInput
from labeling.json_values import has_nul, is_deeper
from labeling.reporters import Reporters
from labeling.tables import Exchange, Feedback, FeedbackKind

Row = dict[str, Any]
NAME_LENGTH = 256  # of ids and names, as POST /v1/feedback takes them
# Beginnings of imported feedback's ids: two tools may give the same id, and none may give one that means something here
# (`labeling.entry`).
TENSORZERO, LANGFUSE, ELSEWHERE = "tz_", "lf_", "im_"


class LineRefused(InvalidInput):
    """The reason stands in the report of the import, beside the line's number."""

    code: ClassVar[str] = "line_refused"


@dataclass(frozen=True)
class Options:
    """`project`: of rows that name none; `into`: of all rows, whichever they name.

    `scales`: rating's name -> (worst, best). `skip`: names of ratings that stay out.
    """

    project: str
    into: str = ""
    scales: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    skip: frozenset[str] = frozenset()
    reporters: Reporters = field(default_factory=Reporters)


def when(*given: Any) -> datetime | None:
    """The first of these that is a time: ISO 8601 (without a zone: UTC) or seconds or milliseconds since 1970."""
    for value in given:
        if value is None or value == "" or isinstance(value, bool):
            continue
        try:
            return _time(value)
        except (ValueError, OverflowError, OSError):
            raise LineRefused(f"{str(value)[:80]!r} is no time") from None
    return None


def _time(value: Any) -> datetime:
    if isinstance(value, int | float):
        return datetime.fromtimestamp(value / 1000 if value > 1e11 else value, UTC)
    if not isinstance(value, str):
        raise ValueError(value)
    text = value.strip()
    if text.replace(".", "", 1).isdigit() and len(text) > 8:
        return _time(float(text))
    found = datetime.fromisoformat(text)
    return found.replace(tzinfo=UTC) if found.tzinfo is None else found.astimezone(UTC)


def when_made(identity: str) -> datetime | None:
    """A UUID of version 7 begins with the milliseconds since 1970 (RFC 9562, 5.7)."""
    try:
        made = uuid.UUID(identity)
    except ValueError:
        return None
    return datetime.fromtimestamp((made.int >> 80) / 1000, UTC) if made.version == 7 else None


def digest_of(*content: Any) -> str:
    """Of a row that brings no id: the same content is the same row, however often it is imported."""
    return hashlib.sha256(msgspec.json.encode(content, order="deterministic")).hexdigest()[:32]


def completion_of(*content: Any) -> str:
    """Of an exchange that brings no completion id. Those that bring one keep it: feedback names them by it."""
    return f"{ELSEWHERE}{digest_of(*content)}"


def exchange_id(project: str, completion_id: str, at: datetime) -> str:
    """As `labeling.database.new_id` makes them, of its own time: rules that draw from new traffic pass by the old.
    The same exchange always has the same one.
    """
    return f"ex_{max(0, int(at.timestamp() * 1000)):011x}{digest_of(project, completion_id)[:16]}"


def name(value: Any, what: str) -> str | None:
    """An id or a name; empty is none."""
    if value is None or value == "":
        return None
    text = str(value) if isinstance(value, int) and not isinstance(value, bool) else value
    if not isinstance(text, str) or len(text) > NAME_LENGTH:
        raise LineRefused(f"{what} must be a text of at most {NAME_LENGTH} characters")
    return text


def needed(row: Row, *keys: str) -> str:
    """The first of these fields that is there."""
    for key in keys:
        if (found := name(row.get(key), key)) is not None:
            return found
    raise LineRefused(f"{keys[0]} is missing")


def decoded(value: Any) -> Any:
    """ClickHouse and Langfuse write JSON into text columns; what only looks like it, or can't be stored, is text."""
    if isinstance(value, str) and value[:1] in "{[":
        try:
            found = msgspec.json.decode(value)
        except (msgspec.MsgspecError, RecursionError, UnicodeError):
            return value
        return value if is_deeper(found) or has_nul(found) else found
    return value


def as_text(value: Any) -> str:
    return value if isinstance(value, str) else msgspec.json.encode(value).decode()


def texts(value: Any) -> dict[str, str]:
    """Tags as ours are: text to text."""
    return {str(key): as_text(item) for key, item in value.items()} if isinstance(value, dict) else {}


def rating(value: Any, called: str, options: Options) -> float | bool:
    """0..1; other scales have to be named, because nobody can guess whether 5 is good."""
    if not isinstance(value, int | float):
        raise LineRefused(f"rating {called!r} is {str(value)[:80]!r}, which is no number")
    if called in options.scales:
        worst, best = options.scales[called]
        scaled = (value - worst) / (best - worst)
        if not 0 <= scaled <= 1:
            raise LineRefused(f"rating {called!r} is {value:g}, outside of its scale {worst:g}:{best:g}")
        return scaled
    if not 0 <= value <= 1:
        raise LineRefused(f"rating {called!r} is {value:g}, not from 0 to 1; give its scale: --scale {called}=1:5")
    return value


def feedback(options: Options, kind: FeedbackKind, **columns: Any) -> Feedback:
    """`created_at` None: nobody wrote down when it was."""
    if columns.get("created_at") is None:
        columns.pop("created_at", None)
    columns["reporter"] = options.reporters.pseudonym(options.project, columns.get("reporter"))
    return Feedback(project=options.project, kind=kind, **columns)


def exchange(options: Options, answer: str, **columns: Any) -> Exchange:
    if columns.get("created_at") is None:
        columns.pop("created_at", None)
    found = Exchange(project=options.project, answers=[answer], **columns)
    found.id = exchange_id(found.project, found.completion_id, found.created_at)
    return found
