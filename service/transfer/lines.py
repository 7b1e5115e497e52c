"""One line of a file into rows: its format is found or given, and what can't be read is refused with the reason."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import msgspec
from sqlmodel import SQLModel

from labeling.errors import InvalidInput
from labeling.feedback_body import InvalidFeedback, parse
from labeling.json_values import DEEPEST, has_nul, is_deeper
from service.ingest import feedback_row
from service.transfer import langfuse, openai_pairs, own_rows, tensorzero
from service.transfer.reading import ELSEWHERE, LineRefused, Options, Row, digest_of, name, when

BOM = b"\xef\xbb\xbf"  # some programs begin a file with it
OURS = re.compile(r"fb_[0-9a-f]{27}(?:[0-9a-f]{5})?")  # of POST /v1/feedback, or of POST /feedback
WRAPPED = 4  # levels that a line has around what is stored


class UnknownFormat(InvalidInput):
    code = "unknown_format"


class Fits(Protocol):
    def __call__(self, row: Row) -> bool: ...


class Read(Protocol):
    def __call__(self, row: Row, options: Options) -> Sequence[SQLModel]: ...


@dataclass(frozen=True)
class Format:
    fits: Fits
    read: Read


def _is_body(row: Row) -> bool:
    return isinstance(row.get("kind"), str)


def _read_body(row: Row, options: Options) -> Sequence[SQLModel]:
    """A body of POST /v1/feedback; beside its fields an id and created_at of its own."""
    said = {key: value for key, value in row.items() if key not in ("id", "created_at")}
    try:
        found = feedback_row(parse(said), options.project, "", options.reporters)
    except InvalidFeedback as error:
        raise LineRefused("; ".join(f"{m['field']}: {m['message']}" for m in error.mistakes[:5])) from None
    found.id = _body_id(name(row.get("id"), "id") or digest_of(options.project, row))
    found.key_id = None
    made: Any = when(row.get("created_at"))
    if made is not None:
        found.created_at = made
    return [found]


def _body_id(given: str) -> str:
    """One that a door of ours answered with says which feedback it is, also where that is known already."""
    return given if OURS.fullmatch(given) else f"{ELSEWHERE}{given}"


# In the order in which they are tried.
FORMATS = {
    "nightschool": Format(own_rows.fits, own_rows.read),
    "feedback": Format(_is_body, _read_body),
    "tensorzero": Format(tensorzero.fits, tensorzero.read),
    "openai": Format(openai_pairs.fits, openai_pairs.read),
    "langfuse": Format(langfuse.fits, langfuse.read),
}


def format_named(given: str | None) -> Format | None:
    """None: found line by line."""
    if given is not None and given not in FORMATS:
        raise UnknownFormat(f"no format {given!r}", hint=f"Formats: {', '.join(FORMATS)}.")
    return FORMATS[given] if given else None


def rows_of(line: bytes, known: Format | None, options: Options) -> list[SQLModel]:
    """[]: left out. An API's page, {"data": [...]}, or a list on one line is as many rows as it holds."""
    try:
        found = msgspec.json.decode(line.removeprefix(BOM))
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        hint = ": a list over many lines becomes one object a line with `jq -c '.[]'`" if line.strip() == b"[" else ""
        raise LineRefused(f"not JSON: {error}{hint}") from None
    except RecursionError:
        raise LineRefused("nested too deeply") from None
    if is_deeper(found, DEEPEST + WRAPPED):
        raise LineRefused("nested too deeply")
    if has_nul(found):
        raise LineRefused("it contains the character U+0000")
    return [row for item in _items(found) for row in _rows(item, known, options)]


def _items(found: Any) -> Iterator[Any]:
    if isinstance(found, dict) and isinstance(found.get("data"), list) and "meta" in found:
        found = found["data"]
    yield from found if isinstance(found, list) else [found]


def _rows(item: Any, known: Format | None, options: Options) -> Sequence[SQLModel]:
    if not isinstance(item, dict):
        raise LineRefused("not an object")
    form = known or next((form for form in FORMATS.values() if form.fits(item)), None)
    if form is None:
        raise LineRefused(f"no known format has the fields {', '.join(sorted(item)[:12])}")
    try:
        return form.read(item, options)
    except RecursionError:
        raise LineRefused("nested too deeply") from None
    except (ArithmeticError, AttributeError, KeyError, TypeError, ValueError) as error:
        raise LineRefused(f"a field is missing or of another kind: {error}") from None
