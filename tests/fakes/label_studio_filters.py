"""The filters of the small Label Studio's task list: those that the product uses."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from datetime import datetime
from typing import Any

WHEN = "%Y-%m-%dT%H:%M:%S.%fZ"
Row = dict[str, Any]


def fits(task: Row, conditions: Iterable[Row]) -> bool:
    return all(_OPERATORS[one["operator"]](_field(task, one["filter"]), one["value"]) for one in conditions)


def _field(task: Row, name: str) -> Any:
    value: Any = task
    for part in name.removeprefix("filter:tasks:").split("."):
        value = value.get(part) if isinstance(value, dict) else None
    return value


def _greater(value: Any, than: Any) -> bool:
    """Times are compared as such. One without microseconds is an error here as it is there."""
    if isinstance(than, int):
        return bool(value > than)
    limit = datetime.strptime(than, WHEN)
    try:
        return datetime.strptime(value, WHEN) > limit
    except (TypeError, ValueError):  # a test's strange task
        return False


_OPERATORS: dict[str, Callable[[Any, Any], bool]] = {
    "greater": _greater,
    "in_list": lambda value, among: value in among,
}
