"""Brings a base model into a local folder, once: from a hub or from another folder. Nights read only what lies there.

What may come is listed here: weights as safetensors, configuration, tokenizer, template, licence. Never pickles, never
code. The folder appears whole, with its record, or not at all; until then everything lies beside it, and is kept.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, ClassVar

from labeling.errors import Conflict, Refused
from loop import model_hub
from loop.adapter_files import BASE_FILES
from loop.base_weights import INDEX
from loop.digests import sync_folder
from loop.model_hub import NO_ROOM, Listing, NoRoom, RemoteFile
from loop.model_record import LICENCE_FILES, ModelRecord, Source, describe, read_record, write_record
from loop.tokenizer_files import problems, read_tokenizer

SMALL = frozenset({*BASE_FILES, INDEX, "README.md", "chat_template.json"})
WEIGHTS = re.compile(r"(?!consolidated|adapter_)[\w.-]+\.safetensors")  # Mistral ships the same weights twice
SPARE_BYTES = 100_000_000

Progress = Callable[[str], None]


class NoBaseModel(Refused):
    code: ClassVar[str] = "no_base_model"
    default_hint = "Name a base model with config.json and *.safetensors; adapters and GGUF files are none."


class OwnCode(Refused):
    code: ClassVar[str] = "model_needs_own_code"
    default_hint = (
        "Code that comes with a model is never run here. Take a model that transformers and vLLM know by themselves; "
        "if they know this one, fetch it from a folder in whose JSON files `auto_map` is removed."
    )


class FolderTaken(Conflict):
    code: ClassVar[str] = "folder_taken"
    default_hint = "Name another folder with --to, or remove that one: another base is another project."


def fetch_from_hub(listing: Listing, to: Path, progress: Progress) -> ModelRecord:
    """Idempotent: the same commit, whole already, is looked at and left alone."""
    source = Source(
        kind="hub",
        where=model_hub.hub_url(listing.address),
        repository=listing.address.repository,
        revision=listing.commit,
    )
    if (known := _already_there(to, source)) is not None:
        return known
    half = _half(to)
    files = {file.name: file for file in listing.files if "/" not in file.name}
    _is_base(files, f"{listing.address.repository} at {source.where}")
    small = [file for name, file in files.items() if name in SMALL or LICENCE_FILES.fullmatch(name)]
    _room(half, small)
    for file in small:
        model_hub.fetch(listing, file, half)
    _no_code(half)
    weights = [files[name] for name in _weights(half, files)]
    _room(half, weights)
    for number, file in enumerate(weights, 1):
        progress(f"{file.name}, {file.bytes / 1e9:.2f} GB ({number} of {len(weights)})")
        model_hub.fetch(listing, file, half)
    return _finish(half, to, source, listing.licence)


def fetch_from_folder(origin: Path, to: Path, progress: Progress) -> ModelRecord:
    """A copy, links followed: also of a hub's cache. Whoever fetched it first stays its source."""
    known = read_record(origin)
    source = known.source if known else Source(kind="folder", where=str(origin.resolve()))
    if (there := _already_there(to, source)) is not None:
        return there
    half = _half(to)
    files = {
        path.name: RemoteFile(path.name, path.stat().st_size, "", "") for path in origin.iterdir() if path.is_file()
    }
    _is_base(files, str(origin))
    _no_code(origin)
    names = [name for name in files if name in SMALL or LICENCE_FILES.fullmatch(name)]
    names += _weights(origin, files)
    _room(half, [files[name] for name in names])
    try:
        for number, name in enumerate(names, 1):
            progress(f"{name}, {files[name].bytes / 1e9:.2f} GB ({number} of {len(names)})")
            shutil.copyfile(origin / name, half / name)
    except OSError as error:
        if error.errno in NO_ROOM:
            raise NoRoom(f"no room for {name} in {half}: {error.strerror}") from error
        raise
    record = _finish(half, to, source, known.licence if known else "")
    if known is not None and record.digest != known.digest:
        shutil.rmtree(to)
        raise model_hub.WrongDigest(
            f"{origin} is no longer what was fetched into it: {record.digest[:19]}…, not {known.digest[:19]}…",
            hint="Its files were changed or damaged since: fetch the model from where it came.",
        )
    return record


def unfit(folder: Path, record: ModelRecord) -> list[str]:
    """What a night's preflight would refuse; told at once, though it may be mended in the settings."""
    tokenizer = read_tokenizer(folder)
    found = problems(tokenizer, record.embedding_rows, None) if tokenizer else []
    return [*found, *([] if record.template_digest else ["it has no chat template: set projects.chat_template"])]


def _already_there(to: Path, source: Source) -> ModelRecord | None:
    if not to.exists() or (to.is_dir() and not any(to.iterdir())):
        return None
    record = read_record(to) if to.is_dir() else None
    if record is None or record.source != source:
        what = f"{record.source.repository or record.source.where}" if record else "something else"
        raise FolderTaken(f"{to} holds {what} already")
    return record


def _half(to: Path) -> Path:
    half = to.parent / f".{to.name}.fetching"
    half.mkdir(parents=True, exist_ok=True)
    return half


def _is_base(files: Iterable[str], what: str) -> None:
    names = set(files)
    if "config.json" not in names:
        raise NoBaseModel(f"{what} holds no config.json: no base model")
    if not any(WEIGHTS.fullmatch(name) for name in names):
        pickled = next((name for name in sorted(names) if name.endswith((".bin", ".pt", ".pth", ".ckpt"))), None)
        raise NoBaseModel(
            f"{what} holds its weights only as pickles ({pickled}), which can run code" if pickled
            else f"{what} holds no *.safetensors"
        )  # fmt: skip


def _no_code(folder: Path) -> None:
    for name in ("config.json", "tokenizer_config.json"):
        path = folder / name
        if path.is_file() and _object(path).get("auto_map"):
            raise OwnCode(f"{name} asks for code of the model's own (auto_map, trust_remote_code)")


def _weights(folder: Path, files: dict[str, RemoteFile]) -> list[str]:
    """Those that the index names; without an index, all."""
    index = folder / INDEX
    if not index.is_file():
        return sorted(name for name in files if WEIGHTS.fullmatch(name))
    named = sorted({str(name) for name in (_object(index).get("weight_map") or {}).values()})
    missing = [name for name in named if name not in files]
    if missing:
        raise NoBaseModel(f"{INDEX} names {missing[0]}, which is not there", hint="Tell those who published it.")
    return named


def _object(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_bytes())
    except ValueError as error:
        raise NoBaseModel(f"{path.name} is not JSON: {error}") from error
    if not isinstance(found, dict):
        raise NoBaseModel(f"{path.name} is not an object")
    return found


def _room(folder: Path, files: list[RemoteFile]) -> None:
    """Said before hours of download, not after."""
    missing = [file for file in files if not (folder / file.name).is_file()]
    needed, free = sum(file.bytes for file in missing) + SPARE_BYTES, shutil.disk_usage(folder).free
    if free < needed:
        raise NoRoom(f"{needed / 1e9:.1f} GB are needed in {folder.parent}, {free / 1e9:.1f} GB are free")


def _finish(half: Path, to: Path, source: Source, licence: str) -> ModelRecord:
    """Record last, then the folder's own name."""
    shutil.rmtree(half / ".cache", ignore_errors=True)  # the hub client's notes
    record = describe(half, source)
    if licence and not record.licence:
        record = record.model_copy(update={"licence": licence})
    write_record(half, record)
    if to.is_dir():
        to.rmdir()  # empty, as was seen
    half.rename(to)
    sync_folder(to.parent)
    return record
