"""Scores one answer against one exam item, by the project's choice. Not a judge: deterministic and offline."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict


class ExamItem(BaseModel):
    """One prompt of the gate. `must_contain`: every entry must be met; an entry "a|b" is met by either."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    id: str
    messages: list[dict[str, Any]]
    reference: str | None = None  # the right answer as written by a person, or the good answer that was given
    must_contain: list[str] = []
