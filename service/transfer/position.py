"""How far a file was imported: kept beside the database after each batch, so that a broken import goes on there.

Only a convenience: without it everything is read again, and known rows are recognised by their keys.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass
class Position:
    """After the last batch that was stored. `report_bytes`: of the file of refused lines, as long as it was then."""

    line: int = 1
    offset: int = 0
    stored: Counter[str] = field(default_factory=Counter)
    duplicates: Counter[str] = field(default_factory=Counter)
    left_out: int = 0
    refused: int = 0
    report_bytes: int = 0

    def add(self, answer: dict[str, Any]) -> None:
        self.stored.update(answer["stored"])
        self.duplicates.update(answer["duplicates"])
        self.left_out += answer["left_out"]
        self.refused += len(answer["refused"])


class Bookmark:
    """One file's, of one way of importing it. A file that changed since is a new one."""

    def __init__(self, data_dir: Path, source: Path, way: Any) -> None:
        there = source.resolve()
        stat = there.stat()
        about = json.dumps([str(there), stat.st_size, stat.st_mtime_ns, way], default=str)
        self._path = data_dir / "state" / "imports" / f"{hashlib.sha256(about.encode()).hexdigest()[:32]}.json"

    def read(self) -> Position:
        try:
            found = json.loads(self._path.read_text(encoding="utf-8"))
            return Position(**{**found, **{key: Counter(found[key]) for key in ("stored", "duplicates")}})
        except (OSError, ValueError, TypeError, KeyError):
            return Position()

    def write(self, position: Position) -> None:
        """Whole or not at all."""
        with contextlib.suppress(OSError):
            self._path.parent.mkdir(parents=True, exist_ok=True)
            temporary = self._path.with_suffix(".part")
            temporary.write_text(json.dumps(vars(position)), encoding="utf-8")
            temporary.replace(self._path)

    def forget(self) -> None:
        with contextlib.suppress(OSError):
            self._path.unlink(missing_ok=True)
