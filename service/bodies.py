"""Request bodies of our own routes: one JSON object, checked by a model, every mistake reported at once."""

from __future__ import annotations

from typing import Any, ClassVar, TypeVar

from litestar import Request
from pydantic import BaseModel, ValidationError

from labeling.errors import InvalidInput
from service.problems import MalformedBody

B = TypeVar("B", bound=BaseModel)


class InvalidBody(InvalidInput):
    code: ClassVar[str] = "invalid_body"

    def __init__(self, mistakes: list[dict[str, str]]) -> None:
        super().__init__(f"{len(mistakes)} mistake(s) in the body: {'; '.join(m['message'] for m in mistakes)}")
        self.mistakes = mistakes


async def read_body(request: Request[Any, Any, Any], kind: type[B]) -> B:
    """An empty body counts as {}."""
    raw = await request.body()
    try:
        return kind.model_validate_json(raw or b"{}")
    except ValidationError as error:
        found = error.errors(include_url=False, include_input=False)
        if any(mistake["type"] == "json_invalid" for mistake in found):
            raise MalformedBody(f"the body is not JSON in UTF-8: {found[0]['msg']}") from None
        raise InvalidBody([{"field": ".".join(map(str, m["loc"])), "message": m["msg"]} for m in found]) from None
