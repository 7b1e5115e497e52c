"""A measured figure as a JSON line: on stdout, and at the end of a file, so that a run cut short leaves what it saw."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def tell(path: Path, figures: Mapping[str, Any]) -> None:
    line = json.dumps(figures)
    print(line, flush=True)
    with path.open("a", encoding="utf-8") as file:
        file.write(line + "\n")


def rounded(values: Mapping[str, Any]) -> dict[str, Any]:
    """Floats to four places."""
    return {key: round(value, 4) if isinstance(value, float) else value for key, value in values.items()}
