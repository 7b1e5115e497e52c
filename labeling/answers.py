"""An answer that somebody gives: text, an assistant message (with tool calls or without), or a JSON value.

Feedback keeps it as it was given; where text is needed (the queue, a label), `answer_text` is its one text form.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

import msgspec

FORMS = "text, an assistant message (with or without tool_calls), or a JSON object or list"


def answer_mistake(value: Any) -> str | None:
    """What is wrong with it as an answer; None where nothing is."""
    if isinstance(value, str):
        return None if value.strip() else "is empty"
    if _is_message(value):
        return _message_mistake(value)
    if isinstance(value, dict | list):
        return None
    return f"must be {FORMS}"


def answer_text(value: Any) -> str:
    """Of an answer that has no mistake. Tool calls read as an exchange's do: a list of name and arguments."""
    if isinstance(value, str):
        return value
    if not _is_message(value):
        return json.dumps(value, ensure_ascii=False)
    said = value.get("content")
    if isinstance(said, list):
        said = "".join(part["text"] for part in said)
    calls = tool_calls_text(call["function"] for call in value["tool_calls"]) if value.get("tool_calls") else ""
    return "\n".join(filter(None, (said, calls)))


def tool_calls_text(functions: Iterable[dict[str, Any]]) -> str:
    """Of {name, arguments} each, as the engine gives them: arguments are JSON in a string."""
    calls = [{"name": function["name"], "arguments": function["arguments"]} for function in functions]
    return msgspec.json.encode(calls).decode()


def calls_tools(text: str) -> bool:
    """Whether a text form ends with tool calls."""
    last = text.rstrip().rpartition("\n")[2]
    if not last.startswith('[{"name":'):
        return False
    try:
        calls = msgspec.json.decode(last)
    except (msgspec.MsgspecError, RecursionError, UnicodeError):
        return False
    return all(isinstance(call, dict) and call.keys() == {"name", "arguments"} for call in calls)


def _is_message(value: Any) -> bool:
    return isinstance(value, dict) and (value.get("role") == "assistant" or "tool_calls" in value)


def _message_mistake(message: dict[str, Any]) -> str | None:
    content, calls = message.get("content"), message.get("tool_calls")
    if message.get("role", "assistant") != "assistant":
        return "the message's role must be assistant"
    if isinstance(content, list) and not all(map(_is_text_part, content)):
        return "the message's content parts must all be text"
    if not isinstance(content, str | list | None):
        return "the message's content must be text, a list of text parts, or null"
    if not isinstance(calls, list | None) or not all(map(_is_call, calls or ())):
        return 'each of tool_calls must have function: {"name": text, "arguments": JSON in a string}'
    return None if calls or _says(content) else "the message has neither content nor tool_calls"


def _says(content: str | list[dict[str, Any]] | None) -> bool:
    return bool(content.strip() if isinstance(content, str) else any(part["text"].strip() for part in content or ()))


def _is_text_part(part: Any) -> bool:
    return isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str)


def _is_call(call: Any) -> bool:
    function = call.get("function") if isinstance(call, dict) else None
    if not isinstance(function, dict):
        return False
    name, arguments = function.get("name"), function.get("arguments")
    if not isinstance(name, str) or not name or not isinstance(arguments, str):
        return False
    try:
        msgspec.json.decode(arguments)
    except (msgspec.MsgspecError, RecursionError, UnicodeError):
        return False
    return True
