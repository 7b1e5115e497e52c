"""Secrets that we make ourselves: files in the data directory that only their owner can read."""

from __future__ import annotations

import os
import secrets
from pathlib import Path


def kept_secret(path: Path, first: str) -> str:
    """What the file holds; `first` is written into it when it is not there yet."""
    if not path.exists():
        write_secret(path, first)
    return path.read_text(encoding="utf-8").strip()


def write_secret(path: Path, value: str) -> None:
    """Whole or not at all, and never readable by others, not for an instant."""
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "w", encoding="utf-8") as file:
        file.write(value + "\n")
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
