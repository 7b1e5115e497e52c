"""What a check found: something to know, or something to mend soon. What must be mended first is raised instead."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from labeling.errors import Refused


class PreflightFailed(Refused):
    code: ClassVar[str] = "preflight_failed"


@dataclass(frozen=True)
class Finding:
    """A `cure` makes it a warning: the night goes on, and its report says so."""

    text: str
    cure: str = ""
