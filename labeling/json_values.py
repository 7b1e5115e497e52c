"""What a decoded JSON value must not be, if it is to be stored and read again."""

from __future__ import annotations

from typing import Any

DEEPEST = 64  # levels of lists and objects: what is written to the database must be readable again


def is_deeper(value: Any, levels: int = DEEPEST) -> bool:
    """Whether lists and objects are nested in more levels than that."""
    if not isinstance(value, dict | list):
        return False
    if levels == 0:
        return True
    return any(is_deeper(inner, levels - 1) for inner in (value.values() if isinstance(value, dict) else value))


def has_nul(value: Any) -> bool:
    """PostgreSQL cannot store the character U+0000 in text."""
    if isinstance(value, str):
        return "\0" in value
    if isinstance(value, dict):
        return any(has_nul(key) or has_nul(item) for key, item in value.items())
    return isinstance(value, list) and any(map(has_nul, value))
