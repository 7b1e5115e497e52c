"""The body of a feedback: strict, and every mistake in it is named at once."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain, islice
from typing import Annotated, Any, TypeGuard

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from labeling.answers import FORMS, answer_mistake, answer_text
from labeling.errors import InvalidInput
from labeling.json_values import DEEPEST, has_nul, is_deeper
from labeling.tables import FeedbackKind
from labeling.wording import same_wording

Name = Annotated[str, Field(min_length=1, max_length=256)]
Tag = Annotated[str, Field(max_length=4096)]
Reason = Annotated[str, Field(min_length=1, max_length=256)]
MISTAKES_NAMED = 100
STARS = 5  # where a rating does not say of how many
MOST_STARS = 100
MOST_NUMBER = 1e15  # beyond, a float is no longer exact


class InvalidFeedback(InvalidInput):
    """`mistakes`: a list of {field, message}."""

    code = "invalid_feedback"
    default_hint = "Correct the fields listed under errors; /schema has the form."

    def __init__(self, mistakes: list[dict[str, str]]) -> None:
        listed = "; ".join(f"{m['field']}: {m['message']}" for m in mistakes[:20])
        super().__init__(f"the feedback has {len(mistakes)} mistake(s): {listed}")
        self.mistakes = mistakes


class FeedbackBody(BaseModel):
    """What was said of one answer. The answer is named by one of exchange_id (the completion id), request_id (the
    X-Request-Id that the app sent), session_id (its last answer), or given as messages and answer.
    """

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    kind: FeedbackKind = Field(strict=False)
    exchange_id: Name | None = None
    request_id: Name | None = None
    session_id: Name | None = None
    messages: list[dict[str, Any]] | None = Field(None, min_length=1, max_length=1000)
    answer: Any = Field(None, description="What the model answered: text, or its message with tool_calls")
    choice: int = Field(0, ge=0, le=127, description="Which of several choices (n > 1)")
    value: Any = Field(
        None,
        description="rating: true or false, 0..1, or {stars, of}; correction: the right answer, as text, an assistant "
        "message or JSON; preference: {chosen, rejected}; flag and comment: none",
    )
    reasons: list[Reason] = Field(default_factory=list, max_length=32)
    severity: float = Field(0.5, ge=0, le=1)
    comment: str | None = Field(None, max_length=20_000)
    reporter: Name | None = None
    tags: dict[Name, Tag] = Field(default_factory=dict, max_length=64)
    project: Name | None = Field(None, description="Needed only where the API key belongs to no project")


def parse(raw: Any) -> FeedbackBody:
    """Raises InvalidFeedback with the mistakes of every field and of their combination."""
    if not isinstance(raw, dict):
        raise InvalidFeedback([{"field": "body", "message": "must be one JSON object"}])
    body, mistakes = None, []
    try:
        body = FeedbackBody.model_validate(raw)
    except ValidationError as error:
        mistakes = [{"field": ".".join(map(str, e["loc"])), "message": e["msg"]} for e in error.errors()]
    wrong = {mistake["field"].split(".")[0] for mistake in mistakes}
    more = (
        {"field": field, "message": message}
        for field, message in chain(_reference(raw), _value(raw), _messages(raw), _nul(raw), _deep(raw))
        if field.split(".")[0] not in wrong
    )
    mistakes = list(islice(chain(mistakes, more), MISTAKES_NAMED))
    if mistakes or body is None:
        raise InvalidFeedback(mistakes)
    if isinstance(body.value, dict) and body.kind is FeedbackKind.RATING:
        return body.model_copy(update={"value": _of_stars(**body.value)})
    return body


def _of_stars(stars: float, of: int = STARS) -> float:
    """The fewest (one) are 0, the most are 1, as with the other ratings."""
    return (stars - 1) / (of - 1)


def _reference(raw: dict[str, Any]) -> Iterator[tuple[str, str]]:
    if (raw.get("messages") is None) != (raw.get("answer") is None):
        missing = "answer" if raw.get("answer") is None else "messages"
        yield missing, "messages and answer go together"
    elif all(raw.get(name) is None for name in ("exchange_id", "request_id", "session_id", "messages")):
        yield "exchange_id", "name the answer: exchange_id, request_id, session_id, or messages and answer"
    if raw.get("answer") is not None and raw["answer"] != "" and (mistake := answer_mistake(raw["answer"])):
        yield "answer", mistake


def _value(raw: dict[str, Any]) -> Iterator[tuple[str, str]]:
    value = raw.get("value")
    match raw.get("kind"):
        case "flag" if value is not None:
            yield "value", "a flag has none; say why in reasons or comment"
        case "comment":
            if value is not None:
                yield "value", "a comment has none; the text goes into comment"
            if not _text(raw.get("comment")):
                yield "comment", "a comment needs its text"
        case "rating" if mistake := _rating_mistake(value):
            yield "value", mistake
        case "correction" if mistake := answer_mistake(value):
            yield "value", f"a correction is the right answer, as {FORMS}: this {mistake}"
        case "preference":
            yield from _preference(value)


def _rating_mistake(value: Any) -> str | None:
    if not isinstance(value, dict):
        fits = isinstance(value, int | float) and 0 <= value <= 1
        return None if fits else 'a rating is true or false, a number from 0 to 1, or {"stars": 4, "of": 5}'
    stars, of = value.get("stars"), value.get("of", STARS)
    if value.keys() - {"stars", "of"} or not _number(stars) or not _number(of) or int(of) != of:
        return 'stars are {"stars": 4, "of": 5}: two numbers, of whole'
    if not 2 <= of <= MOST_STARS:
        return f"of must be from 2 to {MOST_STARS}"
    return None if 1 <= stars <= of else f"stars must be from 1 to {of}"


def _number(value: Any) -> TypeGuard[int | float]:
    """Bounded before anything is computed: JSON's whole numbers have any length, and floats do not."""
    return isinstance(value, int | float) and not isinstance(value, bool) and -MOST_NUMBER <= value <= MOST_NUMBER


def _preference(value: Any) -> Iterator[tuple[str, str]]:
    if not isinstance(value, dict) or set(value) != {"chosen", "rejected"}:
        yield "value", 'a preference is {"chosen": answer, "rejected": answer}'
        return
    mistakes = {name: mistake for name, answer in value.items() if (mistake := answer_mistake(answer))}
    for name, mistake in mistakes.items():
        yield f"value.{name}", f"an answer is {FORMS}: this {mistake}"
    if not mistakes and same_wording(answer_text(value["chosen"]), answer_text(value["rejected"])):
        yield "value", "chosen and rejected are the same answer"


def _text(value: Any) -> bool:
    return isinstance(value, str) and bool(value.strip())


def _messages(raw: dict[str, Any]) -> Iterator[tuple[str, str]]:
    messages = raw.get("messages")
    for index, message in enumerate(messages if isinstance(messages, list) else []):
        if not isinstance(message, dict):
            continue
        if not _text(message.get("role")):
            yield f"messages.{index}.role", "must be a text such as user"
        if not isinstance(message.get("content"), str | list | None):
            yield f"messages.{index}.content", "must be text, a list of parts, or null"


def _nul(raw: dict[str, Any]) -> Iterator[tuple[str, str]]:
    for field, value in raw.items():
        if has_nul(value) or "\0" in field:
            yield field.replace("\0", "\\0"), "contains the character U+0000"


def _deep(raw: dict[str, Any]) -> Iterator[tuple[str, str]]:
    for field, value in raw.items():
        if is_deeper(value):
            yield field, f"lists and objects may be nested in {DEEPEST} levels"
