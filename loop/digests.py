"""SHA-256 of bytes, files, folders and JSON, spelt `sha256:<hex>`; and files written so that they survive a crash."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any


def digest_bytes(data: bytes) -> str:
    return f"sha256:{hashlib.sha256(data).hexdigest()}"


def digest_json(value: Any) -> str:
    """Of the canonical form: sorted keys, no spaces."""
    return digest_bytes(canonical_json(value))


def canonical_json(value: Any) -> bytes:
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()


def digest_file(path: Path) -> str:
    with path.open("rb") as file:
        return f"sha256:{hashlib.file_digest(file, 'sha256').hexdigest()}"


def digest_folder(folder: Path) -> str:
    """Of every file's relative name and bytes."""
    return digest_json({str(p.relative_to(folder)): digest_file(p) for p in sorted(folder.rglob("*")) if p.is_file()})


def write_durably(path: Path, data: bytes) -> None:
    """Temporary name, fsync, rename, fsync of the folder: after a crash the file is whole or not there."""
    temporary = path.with_name(f".{path.name}.tmp")
    with temporary.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_jsonl(path: Path, rows: list[dict[str, Any]]) -> None:
    write_durably(path, b"".join(json.dumps(row, ensure_ascii=False).encode() + b"\n" for row in rows))


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    with path.open(encoding="utf-8") as file:
        return [json.loads(line) for line in file if line.strip()]
