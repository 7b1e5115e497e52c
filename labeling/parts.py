"""Many values in parts: for statements and requests that take only so many, and so that others get their turn."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from itertools import islice
from typing import TypeVar

T = TypeVar("T")


def in_parts(values: Collection[T], size: int) -> Iterator[list[T]]:
    """In their order; none for no values."""
    left = iter(values)
    while part := list(islice(left, size)):
        yield part
