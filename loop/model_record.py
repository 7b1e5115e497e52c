"""`nightschool-model.json` beside a base model: where it came from, its licence, a digest of every file."""

from __future__ import annotations

import json
import re
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from labeling.errors import InvalidInput
from labeling.settings import Strict
from loop.adapter_files import base_digest, file_digest, read_base_config
from loop.base_weights import read_weights
from loop.chat_template import chat_template
from loop.digests import write_durably

RECORD = "nightschool-model.json"
LICENCE_FILES = re.compile(r"(licen[sc]e|notice|use_policy|copying)([._-].*)?", re.IGNORECASE)
FRONT_MATTER_BYTES = 64_000
LICENCE_KEYS = ("license_name", "license")  # `license: other` names itself in license_name


class BadRecord(InvalidInput):
    code = "bad_model_record"
    default_hint = "Delete that file, or fetch the model again; nothing but `model show` and the model card reads it."


class Source(Strict):
    kind: str  # hub | folder
    where: str  # the hub's address, or the folder
    repository: str = ""
    revision: str = ""  # the commit that was fetched


class FileRecord(Strict):
    bytes: int
    sha256: str


class ModelRecord(Strict):
    """`digest` is the one that nights, adapters and evidence name as `base_digest`."""

    version: int = 1
    source: Source
    fetched_at: str
    licence: str
    licence_files: tuple[str, ...]
    architecture: str
    model_type: str
    parameters: int
    dtypes: tuple[str, ...]
    context_tokens: int | None
    embedding_rows: int | None
    digest: str
    template_digest: str
    files: dict[str, FileRecord]


def describe(folder: Path, source: Source) -> ModelRecord:
    """Reads every byte. Raises BaseMissing, BaseDamaged."""
    weights, config = read_weights(folder), read_base_config(folder)
    template = chat_template(folder)
    files = sorted(path for path in folder.iterdir() if path.is_file() and path.name != RECORD)
    return ModelRecord(
        source=source,
        fetched_at=datetime.now(UTC).isoformat(timespec="seconds"),
        licence=licence(folder),
        licence_files=tuple(path.name for path in files if LICENCE_FILES.fullmatch(path.name)),
        architecture=", ".join(config.get("architectures") or _architectures(folder)),
        model_type=str(config.get("model_type", "")),
        parameters=weights.parameters,
        dtypes=weights.dtypes,
        context_tokens=_whole(config.get("max_position_embeddings")),
        embedding_rows=weights.embedding_rows,
        digest=base_digest(folder),
        template_digest=template.digest if template else "",
        files={path.name: FileRecord(bytes=path.stat().st_size, sha256=_hex(path)) for path in files},
    )


def write_record(folder: Path, record: ModelRecord) -> None:
    """Last of all files: a folder that has it is whole."""
    write_durably(folder / RECORD, record.model_dump_json(indent=1).encode() + b"\n")


def read_record(folder: Path) -> ModelRecord | None:
    path = folder / RECORD
    if not path.is_file():
        return None
    try:
        return ModelRecord.model_validate_json(path.read_bytes())
    except (OSError, ValidationError) as error:
        raise BadRecord(f"{path} is not a model's record: {str(error).splitlines()[0]}") from error


def changed_since_fetched(folder: Path) -> list[str]:
    """Files whose size is another than recorded, or which are gone; for their bytes there is the digest."""
    record = read_record(folder)
    if record is None:
        return []
    sizes = {name: (folder / name).stat().st_size if (folder / name).is_file() else -1 for name in record.files}
    return [name for name, kept in record.files.items() if sizes[name] != kept.bytes]


def licence(folder: Path) -> str:
    """As the record, or the front matter of the model's README, names it; empty where nothing does."""
    record = read_record(folder)
    return record.licence if record else licence_of_card(_front_matter(folder / "README.md"))


def licence_of_card(card: dict[str, Any]) -> str:
    named = [str(card[key]) for key in LICENCE_KEYS if card.get(key)]
    return named[0] if named else ""


def _front_matter(path: Path) -> dict[str, str]:
    """The plain `key: value` lines between the two rules at the top."""
    try:
        with path.open(encoding="utf-8", errors="replace") as file:
            lines = file.read(FRONT_MATTER_BYTES).splitlines()
    except OSError:
        return {}
    if not lines or lines[0].strip() != "---":
        return {}
    head = lines[1 : lines.index("---", 1)] if "---" in lines[1:] else []
    pairs = (line.partition(":") for line in head if not line.startswith((" ", "-", "#")))
    return {key.strip(): value.strip().strip("\"'") for key, _, value in pairs if value.strip()}


def _architectures(folder: Path) -> list[str]:
    """Where the text part is a part of config.json, the whole's."""
    return list(json.loads((folder / "config.json").read_bytes()).get("architectures") or [])


def _whole(value: Any) -> int | None:
    return value if isinstance(value, int) else None


def _hex(path: Path) -> str:
    return file_digest(path).removeprefix("sha256:")
