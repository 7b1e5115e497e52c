"""The texts in a message, or in any JSON: read in order, or changed in place.

Left alone are the fields that an API reads (role, type, ids) and what is no text (data: URLs of pictures and sound).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import Any

_NOT_IN_TYPE = re.compile(r"[^\w.+/;=-]")
_NOT_BASE64 = re.compile(r"[^A-Za-z0-9+/_=-]")
LEFT_ALONE = frozenset({"role", "type", "id", "tool_call_id"})


def texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        if not _is_data_url(value):
            yield value
    elif isinstance(value, list | tuple):
        for item in value:
            yield from texts(item)
    elif isinstance(value, dict):
        for key, item in value.items():
            if key not in LEFT_ALONE:
                yield from texts(item)


def changed(value: Any, change: Callable[[str], str]) -> Any:
    """A copy with every text changed; a whole number becomes a text where its digits would be."""
    if isinstance(value, str):
        return value if _is_data_url(value) else change(value)
    if isinstance(value, list | tuple):
        return [changed(item, change) for item in value]
    if isinstance(value, dict):
        return {key: item if key in LEFT_ALONE else changed(item, change) for key, item in value.items()}
    if isinstance(value, int) and not isinstance(value, bool):
        written = change(str(value))
        return value if written == str(value) else written
    return value


def _is_data_url(text: str) -> bool:
    """Nothing but base64 behind its type: prose that begins so is a text like any other."""
    if not text.startswith("data:"):
        return False
    kind, _, data = text.removeprefix("data:").partition(";base64,")
    return bool(data) and not _NOT_IN_TYPE.search(kind) and not _NOT_BASE64.search(data)
