"""Prompts and answers out of what tracing tools log: OpenAI's forms, plain text, or any JSON."""

from __future__ import annotations

from typing import Any

from service.transfer.reading import LineRefused, as_text, decoded

Messages = list[dict[str, Any]]


def prompt_of(value: Any) -> Messages:
    """Messages as they are; everything else as what one user said."""
    value = decoded(value)
    if isinstance(value, dict):
        if value.get("messages"):
            return prompt_of(value["messages"])
        if isinstance(value.get("prompt"), str):
            value = value["prompt"]
    if isinstance(value, list) and value and all(isinstance(message, dict) and "role" in message for message in value):
        return [_message(message) for message in value]
    if value is None or value in ("", [], {}):
        raise LineRefused("it has no prompt")
    return [{"role": "user", "content": as_text(value)}]


def answer_of(value: Any) -> str:
    """The text that the user saw; of tool calls, the calls as JSON."""
    value = decoded(value)
    if isinstance(value, dict) and isinstance(value.get("choices"), list) and value["choices"]:
        choice = value["choices"][0]
        value = choice.get("message", choice.get("text")) if isinstance(choice, dict) else choice
    if isinstance(value, list) and value and all(isinstance(message, dict) and "role" in message for message in value):
        value = value[-1]
    if isinstance(value, dict) and ("content" in value or "tool_calls" in value):
        text = _content(value.get("content"))
        calls = value.get("tool_calls")
        value = text if text or not calls else tool_calls_text(calls)
    answer = "" if value is None else as_text(value)
    if not answer.strip():
        raise LineRefused("it has no answer")
    return answer


def tool_calls_text(calls: Any) -> str:
    """As the gateway stores them: [{"name", "arguments"}], the arguments as the model wrote them."""
    if not isinstance(calls, list) or not all(isinstance(call, dict) for call in calls):
        raise LineRefused("tool_calls must be a list of objects")
    functions = [call.get("function") if isinstance(call.get("function"), dict) else call for call in calls]
    return as_text([{"name": str(f.get("name")), "arguments": as_text(f.get("arguments") or "")} for f in functions])


def split_conversation(value: Any) -> tuple[Messages, str]:
    """A whole conversation: what came before the assistant's last message, and that message."""
    if not isinstance(value, list) or not all(isinstance(message, dict) for message in value):
        raise LineRefused("messages must be a list of objects")
    if len(value) < 2 or value[-1].get("role") != "assistant":
        raise LineRefused("the last message is not the assistant's: there is no answer")
    return prompt_of(value[:-1]), answer_of(value[-1])


def _message(message: dict[str, Any]) -> dict[str, Any]:
    if not isinstance(message["role"], str) or not message["role"].strip():
        raise LineRefused("a message's role must be a text such as user")
    if not isinstance(message.get("content"), str | list | None):
        return {**message, "content": as_text(message["content"])}
    return message


def _content(content: Any) -> str:
    if isinstance(content, list):
        return "".join(str(part.get("text") or "") for part in content if isinstance(part, dict))
    return "" if content is None else as_text(content)
