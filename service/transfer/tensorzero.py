"""TensorZero's rows, of ClickHouse (JSONEachRow) and PostgreSQL alike, and the bodies of its `/feedback`.

ChatInference and JsonInference become exchanges: the inference is the completion, the episode the session. Boolean and
float metrics become ratings, comments comments, demonstrations corrections.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from labeling.answers import answer_mistake
from labeling.tables import Exchange, Feedback, FeedbackKind
from labeling.tensorzero import METRIC_TAG, RESERVED
from service.transfer.conversation import Messages, tool_calls_text
from service.transfer.reading import (
    TENSORZERO,
    LineRefused,
    Options,
    Row,
    as_text,
    decoded,
    digest_of,
    exchange,
    feedback,
    name,
    needed,
    rating,
    texts,
    when,
    when_made,
)

INFERENCE = {"function_name", "variant_name", "episode_id"}


def fits(row: Row) -> bool:
    if row.keys() >= INFERENCE or row.keys() >= {"inference_id", "raw_request"}:
        return True
    target = bool({"target_id", "inference_id", "episode_id"} & row.keys())
    return target and "value" in row and "kind" not in row


def read(row: Row, options: Options) -> list[Exchange | Feedback]:
    """[]: left out."""
    if row.keys() >= INFERENCE:
        return [_inference(row, options)]
    if "value" not in row:
        raise LineRefused("a row of ModelInference: import ChatInference and JsonInference instead")
    metric = str(row.get("metric_name") or ("comment" if "target_id" in row else "demonstration"))
    if metric in options.skip or metric.startswith(RESERVED) or row.get("dryrun"):
        return []
    match metric:
        case "comment":
            return [_comment(row, options)]
        case "demonstration":
            return [_demonstration(row, options)]
    return [_rating(row, options)]


def _inference(row: Row, options: Options) -> Exchange:
    if "input" not in row or "output" not in row:
        raise LineRefused("input or output is missing: join chat_inferences with chat_inference_data, which has them")
    identity = needed(row, "id")
    parameters = decoded(row.get("inference_params"))
    parameters = parameters if isinstance(parameters, dict) else {}
    kept = {**parameters, **({"tags": row["tags"]} if row.get("tags") else {})}
    return exchange(
        options,
        _output(row["output"]),
        completion_id=identity,
        session_id=name(row["episode_id"], "episode_id"),
        served=f"{row['function_name']}/{row['variant_name']}",
        messages=list(_messages(decoded(row["input"]))),
        parameters=kept,
        latency_ms=float(row.get("processing_time_ms") or 0),
        created_at=_made(row, identity),
    )


def _rating(row: Row, options: Options) -> Feedback:
    metric = needed(row, "metric_name")
    value = rating(row["value"], metric, options)
    return _feedback(
        row, options, FeedbackKind.RATING, value=value, tags={**texts(row.get("tags")), METRIC_TAG: metric}
    )


def _comment(row: Row, options: Options) -> Feedback:
    if not isinstance(row["value"], str) or not row["value"].strip():
        raise LineRefused("a comment without text")
    return _feedback(row, options, FeedbackKind.COMMENT, comment=row["value"], tags=texts(row.get("tags")))


def _demonstration(row: Row, options: Options) -> Feedback:
    if "inference_id" not in row:
        raise LineRefused("a demonstration belongs to an inference: inference_id is missing")
    value = _demonstrated(row["value"])
    return _feedback(row, options, FeedbackKind.CORRECTION, value=value, tags=texts(row.get("tags")))


def _demonstrated(value: Any) -> Any:
    """Text; of tool calls alone, the assistant's message with them, which can be trained on as such."""
    blocks = decoded(value)
    calls = [block for block in blocks if _is(block, "tool_call")] if isinstance(blocks, list) else []
    if not calls or any(_is(block, "text") for block in blocks):
        return _output(value)
    functions = [{"type": "function", "function": _call(block)} for block in calls]
    message = {"role": "assistant", "content": None, "tool_calls": functions}
    if mistake := answer_mistake(message):
        raise LineRefused(f"a demonstration: {mistake}")
    return message


def _is(block: Any, kind: str) -> bool:
    return isinstance(block, dict) and block.get("type") == kind


def _feedback(row: Row, options: Options, kind: FeedbackKind, **columns: Any) -> Feedback:
    given = name(row.get("id"), "id")
    identity = f"{TENSORZERO}{given or digest_of(options.project, row)}"
    return feedback(options, kind, id=identity, created_at=_made(row, given or ""), **_target(row), **columns)


def _target(row: Row) -> dict[str, str | None]:
    """A metric's row does not say whether its target is an inference or an episode: it is looked for as both."""
    if row.get("inference_id"):
        return {"completion_id": needed(row, "inference_id")}
    if row.get("episode_id"):
        return {"session_id": needed(row, "episode_id")}
    target = needed(row, "target_id")
    match row.get("target_type"):
        case "inference":
            return {"completion_id": target}
        case "episode":
            return {"session_id": target}
    return {"completion_id": target, "session_id": target}


def _made(row: Row, identity: str) -> Any:
    """The id tells milliseconds; ClickHouse's `timestamp` whole seconds only."""
    return when_made(identity) or when(row.get("created_at"), row.get("timestamp"))


def _messages(given: Any) -> Iterator[dict[str, Any]]:
    if not isinstance(given, dict) or not isinstance(given.get("messages", []), list):
        raise LineRefused('input must be {"system", "messages"}')
    if given.get("system"):
        yield {"role": "system", "content": as_text(given["system"])}
    messages = given.get("messages", [])
    for message in messages:
        yield from _message(message)
    if not messages and not given.get("system"):
        raise LineRefused("it has no prompt")


def _message(message: Any) -> Messages:
    """One of TensorZero's may hold the results of several tools, each a message of its own at OpenAI."""
    if not isinstance(message, dict) or not isinstance(message.get("role"), str):
        raise LineRefused("a message of input has no role")
    content = message.get("content")
    blocks = [{"type": "text", "text": content}] if isinstance(content, str) else content
    if not isinstance(blocks, list) or not all(isinstance(block, dict) for block in blocks):
        raise LineRefused("a message's content must be text or a list of blocks")
    parts: list[dict[str, Any]] = []
    calls: list[dict[str, Any]] = []
    results: Messages = []
    for block in blocks:
        match block.get("type"):
            case "tool_call":
                function = {"name": block.get("name"), "arguments": as_text(block.get("arguments") or "{}")}
                calls.append({"id": block.get("id"), "type": "function", "function": function})
            case "tool_result":
                results.append(
                    {"role": "tool", "tool_call_id": block.get("id"), "content": as_text(block.get("result") or "")}
                )
            case "thought":
                continue
            case _:
                parts.append(_part(block))
    converted: dict[str, Any] = {"role": message["role"], "content": _joined(parts)}
    if calls:
        converted["tool_calls"] = calls
    return [*results, *([converted] if parts or calls or not results else [])]


def _part(block: dict[str, Any]) -> dict[str, Any]:
    """Text in its three spellings; a template's arguments are all that was stored of what was said."""
    match block.get("type"):
        case "text" | "raw_text" | "template":
            said = next((block[key] for key in ("text", "value", "arguments") if block.get(key) is not None), "")
            return {"type": "text", "text": as_text(said)}
    return block


def _joined(parts: list[dict[str, Any]]) -> str | list[dict[str, Any]] | None:
    if len(parts) == 1 and parts[0].get("type") == "text":
        return str(parts[0]["text"])
    return parts or None


def _output(value: Any) -> str:
    """A chat's blocks, or {"raw", "parsed"} of a JSON function."""
    value = decoded(value)
    if isinstance(value, dict) and "raw" in value:
        value = value["raw"] if value["raw"] is not None else value.get("parsed")
    if isinstance(value, list) and all(isinstance(block, dict) for block in value):
        said = "\n".join(as_text(_part(block)["text"]) for block in value if block.get("type") in ("text", "raw_text"))
        calls = [block for block in value if block.get("type") == "tool_call"]
        value = said or (tool_calls_text([_call(block) for block in calls]) if calls else "")
    answer = "" if value is None else as_text(value)
    if not answer.strip():
        raise LineRefused("it has no answer")
    return answer


def _call(block: dict[str, Any]) -> dict[str, Any]:
    return {
        "name": block.get("name") or block.get("raw_name"),
        "arguments": block.get("raw_arguments") or as_text(block.get("arguments") or {}),
    }
