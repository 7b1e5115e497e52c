"""Results that need not be measured again, by digest of all that could change them. A file a key, written whole."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from loop.digests import canonical_json, digest_json, write_durably


class EvaluationCache:
    def __init__(self, data_dir: Path) -> None:
        self.folder = data_dir / "cache" / "evaluations"

    def get(self, key: Any) -> Any | None:
        """What was put under an equal key; a file that is not whole JSON of that key counts as nothing."""
        try:
            kept = json.loads(self._path(key).read_bytes())
        except (OSError, ValueError):
            return None
        return kept["value"] if kept.get("key") == json.loads(canonical_json(key)) else None

    def put(self, key: Any, value: Any) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        write_durably(self._path(key), canonical_json({"key": key, "value": value}))

    def _path(self, key: Any) -> Path:
        return self.folder / f"{digest_json(key).removeprefix('sha256:')}.json"
