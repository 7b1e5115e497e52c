"""A base model's weights as files: every shard there and whole, as far as headers and samples tell. No torch, no trust.

Seconds for any size: the digest, which reads every byte, is `loop.adapter_files.base_digest`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from loop.adapter_files import read_base_config
from loop.plain_lora import BaseMissing
from loop.tensor_file import BadTensorFile, Tensor, read_header

INDEX = "model.safetensors.index.json"
NUMBERED = re.compile(r"(.+)-(\d{5})-of-(\d{5})\.safetensors")
LAYER = re.compile(r"(?:^|\.)layers\.(\d+)\.")
EMBEDDINGS = ("embed_tokens.weight", "wte.weight", "word_embeddings.weight", "embed_in.weight", "tok_embeddings.weight")
LFS_POINTER = b"version https://git-lfs"
UNFINISHED = ("*.incomplete", "*.part", "*.crdownload", "*.aria2", ".cache/huggingface/download/*.incomplete")
SAMPLES, SAMPLE_BYTES = 16, 4096
WORTH_SAMPLING = 1_000_000


class BaseDamaged(BaseMissing):
    code = "base_damaged"
    default_hint = "Fetch it again: `nightschool model fetch` takes up a broken-off download and checks every file."


@dataclass(frozen=True)
class BaseWeights:
    """`embedding_rows` is None where no tensor has a known embedding's name. Bytes are those of the files."""

    files: tuple[Path, ...]
    parameters: int
    bytes: int
    embedding_rows: int | None
    dtypes: tuple[str, ...]  # the most frequent first


def read_weights(folder: Path) -> BaseWeights:
    """BaseDamaged, naming the file, for whatever is missing, cut short, not yet downloaded or made of zeros."""
    config = read_base_config(folder)
    _finished(folder)
    index = _index(folder)
    files = _files(folder, index)
    by_file = {path: _header(path) for path in files}
    _as_indexed(folder, index, by_file)
    for path, announced in by_file.items():
        _not_empty(path, announced)
    tensors = {tensor.name: tensor for found in by_file.values() for tensor in found}
    _all_layers(folder, tensors, config)
    return BaseWeights(
        files=files,
        parameters=sum(prod(tensor.shape) for tensor in tensors.values()),
        bytes=sum(path.stat().st_size for path in files),
        embedding_rows=_embedding_rows(tensors),
        dtypes=_dtypes(tensors),
    )


def _finished(folder: Path) -> None:
    left = next((path for pattern in UNFINISHED for path in folder.glob(pattern)), None)
    if left is not None:
        raise BaseDamaged(f"{left} is a download that was broken off")


def _files(folder: Path, index: dict[str, str]) -> tuple[Path, ...]:
    names = sorted(set(index.values())) if index else sorted(path.name for path in folder.glob("*.safetensors"))
    if not names:
        raise BaseMissing(f"{folder} holds no *.safetensors: no weights, or only as pickles, which are never read")
    missing = [name for name in [*names, *(() if index else _unlisted(names))] if not (folder / name).is_file()]
    if missing:
        told = f"{INDEX} names" if index else "the other shards' names ask for"
        raise BaseDamaged(f"{len(missing)} of the weights' files are not in {folder}: {told} {missing[0]}")
    return tuple(folder / name for name in names)


def _unlisted(names: list[str]) -> Iterator[str]:
    """`model-00001-of-00003` asks for the other two, also where the index itself is missing."""
    for name in names:
        if found := NUMBERED.fullmatch(name):
            stem, _, count = found.groups()
            yield from (f"{stem}-{number:05}-of-{count}.safetensors" for number in range(1, int(count) + 1))


def _index(folder: Path) -> dict[str, str]:
    """Tensor -> file; empty where there is no index."""
    path = folder / INDEX
    if not path.exists():
        return {}
    try:
        listed = json.loads(path.read_bytes())["weight_map"]
        found = {str(tensor): str(name) for tensor, name in listed.items()}
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise BaseDamaged(f"{path} is not an index of tensors: {error}") from error
    odd = next((name for name in found.values() if "/" in name or name.startswith(".")), None)
    if odd is not None:
        raise BaseDamaged(f"{path} names {odd!r}, which is no file of this folder")
    return found


def _header(path: Path) -> tuple[Tensor, ...]:
    with path.open("rb") as file:
        if file.read(len(LFS_POINTER)) == LFS_POINTER:
            raise BaseDamaged(
                f"{path} is a Git LFS pointer, not the weights",
                hint="Run `git lfs pull` there, or fetch the model with `nightschool model fetch`.",
            )
    try:
        return read_header(path)
    except BadTensorFile as error:
        raise BaseDamaged(f"{path.parent}: {error}") from error


def _as_indexed(folder: Path, index: dict[str, str], by_file: dict[Path, tuple[Tensor, ...]]) -> None:
    there = {(path.name, tensor.name) for path, tensors in by_file.items() for tensor in tensors}
    absent = [(file, name) for name, file in index.items() if (file, name) not in there]
    if absent:
        file, name = absent[0]
        raise BaseDamaged(f"{folder / INDEX} places {len(absent)} tensors where they are not: {name} is not in {file}")


def _not_empty(path: Path, tensors: tuple[Tensor, ...]) -> None:
    """Room set aside for a download has the right size and holds zeros."""
    size = path.stat().st_size
    if size < WORTH_SAMPLING:
        return
    start = min((tensor.start for tensor in tensors), default=size)
    with path.open("rb") as file:
        empty = sum(not _sample(file, start + (size - start) * number // SAMPLES) for number in range(SAMPLES))
    if 2 * empty > SAMPLES:
        raise BaseDamaged(f"{path} is mostly zeros ({empty} of {SAMPLES} samples): room set aside, never filled")


def _sample(file: Any, place: int) -> bytes:
    file.seek(place)
    sample: bytes = file.read(SAMPLE_BYTES).strip(b"\0")
    return sample


def _all_layers(folder: Path, tensors: dict[str, Tensor], config: dict[str, Any]) -> None:
    wanted = config.get("num_hidden_layers")
    found = {int(match[1]) for name in tensors if (match := LAYER.search(name))}
    if isinstance(wanted, int) and found and set(range(wanted)) - found:
        raise BaseDamaged(
            f"{folder}: config.json says {wanted} layers, and layer {min(set(range(wanted)) - found)} has no weights"
        )


def _embedding_rows(tensors: dict[str, Tensor]) -> int | None:
    return next((tensor.shape[0] for name, tensor in tensors.items() if name.endswith(EMBEDDINGS)), None)


def _dtypes(tensors: dict[str, Tensor]) -> tuple[str, ...]:
    bytes_of: dict[str, int] = {}
    for tensor in tensors.values():
        bytes_of[tensor.dtype] = bytes_of.get(tensor.dtype, 0) + tensor.size
    return tuple(sorted(bytes_of, key=lambda dtype: -bytes_of[dtype]))
