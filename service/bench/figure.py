"""One measured figure and the bar that it is held to."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from typing import Any


class Bar(StrEnum):
    AT_LEAST = ">="
    AT_MOST = "<="
    EQUAL = "="


@dataclass(frozen=True)
class Figure:
    """`value` is a ratio or a count, not a time, where it can be helped: machines differ. `detail` says what was seen.

    A `value` of nan is a figure that was not measured, and `detail` says why: no bar is met by it.
    """

    figure: str
    value: float
    bar: float
    how: Bar = Bar.AT_LEAST
    detail: str = ""

    @property
    def met(self) -> bool:
        match self.how:
            case Bar.AT_LEAST:
                return self.value >= self.bar
            case Bar.AT_MOST:
                return self.value <= self.bar
            case Bar.EQUAL:
                return self.value == self.bar

    def as_json(self) -> dict[str, Any]:
        bar = f"{self.how} {self.bar:g}"
        return {
            "figure": self.figure,
            "value": None if math.isnan(self.value) else round(self.value, 4),
            "bar": bar,
            "met": self.met,
            "detail": self.detail,
        }


Say = Callable[[str], None]  # one line of progress, on stderr
