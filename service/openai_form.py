"""The forms that OpenAI's clients and vLLM share: errors, model cards, a request's fields, an answer's model name."""

from __future__ import annotations

import re
from functools import lru_cache
from typing import Any

import msgspec

from labeling.errors import NightschoolError
from service.alias_table import UnknownModel
from service.problems import MalformedBody, status_of

ERROR_TYPES = {
    400: "BadRequestError",
    401: "AuthenticationError",
    403: "PermissionDeniedError",
    404: "NotFoundError",
    405: "MethodNotAllowedError",
    413: "BadRequestError",
    500: "InternalServerError",
    503: "ServiceUnavailableError",
}


def error_body(status: int, message: str, param: str | None = None) -> bytes:
    kind = ERROR_TYPES.get(status, "BadRequestError" if status < 500 else "InternalServerError")
    return msgspec.json.encode({"error": {"message": message, "type": kind, "param": param, "code": status}})


def error_of(error: NightschoolError) -> tuple[int, bytes]:
    status = status_of(type(error))
    message = f"{str(error).rstrip('.')}. {error.hint}".strip()
    return status, error_body(status, message, "model" if isinstance(error, UnknownModel) else None)


def model_card(alias: str) -> dict[str, Any]:
    return {"id": alias, "object": "model", "created": 0, "owned_by": "nightschool", "root": alias, "parent": None}


def parse_request(body: bytes) -> tuple[dict[str, msgspec.Raw], str]:
    """The top-level fields, each as its own bytes so that nothing is respelled, and the model's name."""
    try:
        str(body, "utf-8")
        fields = msgspec.json.decode(body, type=dict[str, msgspec.Raw])
        model = msgspec.json.decode(fields["model"], type=str) if "model" in fields else ""
    except UnicodeDecodeError as error:
        raise MalformedBody(f"the body is not UTF-8: byte {error.start}") from None
    except RecursionError:
        raise MalformedBody("the body is nested too deeply") from None
    except msgspec.MsgspecError as error:
        raise MalformedBody(f"the body is not what it should be: {error}") from None
    if not model:
        raise MalformedBody("the body names no model")
    return fields, model


def with_model(fields: dict[str, msgspec.Raw], served: str) -> bytes:
    return msgspec.json.encode({**fields, "model": served})


def is_streaming(fields: dict[str, msgspec.Raw]) -> bool:
    return bytes(fields.get("stream", b"false")) == b"true"


class ModelName:
    """Puts the requested name back where the engine wrote the served one.

    `"model":"x"` cannot stand inside a JSON text, where its quotes would be escaped: only the field itself matches.
    """

    def __init__(self, served: str, requested: str) -> None:
        self._pattern = re.compile(rb'"model"\s*:\s*"' + re.escape(served.encode()) + b'"')
        self._name = b'"model":' + msgspec.json.encode(requested)

    @classmethod
    @lru_cache(maxsize=256)
    def of(cls, served: str, requested: str) -> ModelName:
        return cls(served, requested)

    def whole(self, body: bytes) -> bytes:
        return self._pattern.sub(lambda _: self._name, body)

    def lines(self) -> Lines:
        return Lines(self)


class Lines:
    """The same for one stream, line by line."""

    def __init__(self, name: ModelName) -> None:
        self._name = name
        self._tail = b""

    def feed(self, chunk: bytes) -> bytes:
        """The whole lines so far; a broken one waits for its end."""
        lines, newline, self._tail = (self._tail + chunk).rpartition(b"\n")
        return self._name.whole(lines + newline)

    def rest(self) -> bytes:
        return self._name.whole(self._tail)
