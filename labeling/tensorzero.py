"""TensorZero's feedback as ours. Its metrics are declared in a settings file there, and its targets are UUIDs.

An inference is an exchange, an episode a session, a demonstration a correction; any other metric is a rating. Written
to https://www.tensorzero.com/docs/gateway/api-reference/feedback and the gateway's own checks.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Mapping
from typing import Any

from labeling.errors import InvalidInput
from labeling.feedback_body import MOST_NUMBER
from labeling.settings import MetricSettings

FIELDS = frozenset({"episode_id", "inference_id", "metric_name", "value", "internal", "tags", "dryrun"})
RESERVED = "tensorzero::"
METRIC_TAG = f"{RESERVED}metric_name"  # nobody else may send tags that begin so


class InvalidTensorZeroFeedback(InvalidInput):
    code = "invalid_tensorzero_feedback"
    default_hint = "The form is that of https://www.tensorzero.com/docs/gateway/api-reference/feedback."


def translated(raw: Any, metrics: Mapping[str, MetricSettings]) -> dict[str, Any]:
    """The body in our form, still to be checked as such; `metrics` by their TensorZero names."""
    if not isinstance(raw, dict):
        raise InvalidTensorZeroFeedback("the body must be one JSON object")
    if unknown := sorted(raw.keys() - FIELDS):
        raise InvalidTensorZeroFeedback(f"unknown field `{unknown[0][:80]}`")
    name, value = raw.get("metric_name"), raw.get("value")
    if not isinstance(name, str) or not name:
        raise InvalidTensorZeroFeedback("metric_name is missing")
    if "value" not in raw:
        raise InvalidTensorZeroFeedback("value is missing")
    about = {**_target(raw, name), "tags": _tags(raw, name)}
    match name:
        case "comment":
            if not isinstance(value, str):
                raise InvalidTensorZeroFeedback("Feedback value for a comment must be a string")
            return {**about, "kind": "comment", "comment": value}
        case "demonstration":
            return {**about, "kind": "correction", "value": _demonstrated(value)}
    return {**about, "kind": "rating", "value": _rated(name, value, metrics.get(name))}


def is_dry_run(raw: Any) -> bool:
    value = raw.get("dryrun") if isinstance(raw, dict) else None
    if not isinstance(value, bool | None):
        raise InvalidTensorZeroFeedback("dryrun must be a boolean")
    return bool(value)


def plain_id(target: str) -> str:
    """A UUID in its usual spelling; our completion ids, which are none, as they are."""
    try:
        return str(uuid.UUID(target))
    except ValueError:
        return target


def _target(raw: dict[str, Any], name: str) -> dict[str, str]:
    inference, episode = raw.get("inference_id"), raw.get("episode_id")
    if inference is not None and episode is not None:
        raise InvalidTensorZeroFeedback("Both episode_id and inference_id cannot be provided")
    if name == "demonstration" and inference is None:
        raise InvalidTensorZeroFeedback('Correct ID was not provided for feedback level "inference".')
    for field, ours, given in (("inference_id", "exchange_id", inference), ("episode_id", "session_id", episode)):
        if given is not None:
            if not isinstance(given, str) or not given:
                raise InvalidTensorZeroFeedback(f"{field} must be an id")
            return {ours: plain_id(given)}
    raise InvalidTensorZeroFeedback("Exactly one of inference_id or episode_id must be provided")


def _tags(raw: dict[str, Any], name: str) -> dict[str, Any]:
    tags = raw.get("tags", {})
    if not isinstance(tags, dict):
        raise InvalidTensorZeroFeedback("tags must be a map from text to text")
    if not raw.get("internal"):
        for tag in tags:
            if tag.startswith(RESERVED):
                raise InvalidTensorZeroFeedback(f"Tag name cannot start with '{RESERVED}': {tag[:80]}")
    return {**tags, METRIC_TAG: name}


def _demonstrated(value: Any) -> Any:
    """Text, a list of content blocks, or the JSON that a JSON function should have given."""
    if not isinstance(value, list) or not all(isinstance(block, dict) and "type" in block for block in value):
        return value
    texts = [str(block.get("text", "")) for block in value if block["type"] == "text"]
    calls = [_call(block) for block in value if block["type"] == "tool_call"]
    if len(texts) + len(calls) != len(value):
        raise InvalidTensorZeroFeedback("Invalid demonstration content block: neither text nor tool_call")
    text = "\n".join(texts)
    return {"role": "assistant", "content": text or None, "tool_calls": calls} if calls else text


def _call(block: dict[str, Any]) -> dict[str, Any]:
    name = block.get("name")
    if not isinstance(name, str) or not name:
        raise InvalidTensorZeroFeedback("Demonstration contains invalid tool name")
    if "arguments" not in block:
        raise InvalidTensorZeroFeedback("Demonstration contains invalid tool call arguments")
    given = block["arguments"]
    arguments = given if isinstance(given, str) else json.dumps(given, ensure_ascii=False)
    return {"type": "function", "function": {"name": name, "arguments": arguments}}


def _rated(name: str, value: Any, metric: MetricSettings | None) -> bool | float:
    """0..1, one being good, whatever the metric's own range and direction."""
    if isinstance(value, bool):
        return value is not (metric is not None and metric.optimize == "min")
    if not isinstance(value, int | float) or not -MOST_NUMBER <= value <= MOST_NUMBER:
        raise InvalidTensorZeroFeedback(f"Feedback value for metric `{name}` must be a number or a boolean")
    metric = metric or MetricSettings.model_validate({})
    share = (value - metric.low) / (metric.high - metric.low)
    if not 0 <= share <= 1:
        raise InvalidTensorZeroFeedback(
            f"metric `{name}` is {value:g}, outside {metric.low:g}..{metric.high:g}",
            hint=f"Say its range in the settings: [projects.labeling.metrics.{name}] low = …, high = ….",
        )
    return 1 - share if metric.optimize == "min" else share
