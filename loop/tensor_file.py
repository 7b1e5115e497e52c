"""Reads a safetensors file without torch and without trust: bounded header, exact offsets, bytes as numpy arrays."""

from __future__ import annotations

import json
import mmap
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, BinaryIO, ClassVar

import numpy as np
from numpy.typing import NDArray

from labeling.errors import Refused

MAX_HEADER_BYTES = 4_000_000  # 70 layers x 14 tensors are 200 kB; the format itself would allow 100 MB of JSON
BYTES_OF = {"F32": 4, "F16": 2, "BF16": 2}
MAX_BASE_HEADER_BYTES = 100_000_000  # the format's own limit; a base of many experts has megabytes of names


class BadTensorFile(Refused):
    code: ClassVar[str] = "bad_tensor_file"
    default_hint = "The file is damaged or no safetensors file of float tensors: write it again."


@dataclass(frozen=True)
class Tensor:
    """`start` counts from the file's first byte."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    size: int


class TensorFile:
    """An open file of float tensors: by name, in the order of their names."""

    def __init__(self, tensors: tuple[Tensor, ...], buffer: mmap.mmap) -> None:
        self.tensors = {tensor.name: tensor for tensor in sorted(tensors, key=lambda t: t.name)}
        self._buffer = buffer

    def raw(self, tensor: Tensor) -> bytes:
        return self._buffer[tensor.start : tensor.start + tensor.size]

    def values(self, tensor: Tensor) -> NDArray[np.float32]:
        raw = self.raw(tensor)
        if tensor.dtype == "BF16":  # numpy has no bfloat16: it is the upper half of a float32
            return (np.frombuffer(raw, "<u2").astype(np.uint32) << 16).view(np.float32).reshape(tensor.shape)
        kind = "<f4" if tensor.dtype == "F32" else "<f2"
        return np.frombuffer(raw, kind).astype(np.float32).reshape(tensor.shape)


@contextmanager
def open_tensors(path: Path) -> Iterator[TensorFile]:
    """BadTensorFile for whatever is not exactly a header and the float tensors that it announces."""
    with path.open("rb") as file:
        tensors = _announced(path, file, MAX_HEADER_BYTES)
        for tensor in tensors:
            if tensor.dtype not in BYTES_OF:
                kinds = ", ".join(BYTES_OF)
                raise BadTensorFile(
                    f"{path.name}: tensor {tensor.name[:200]!r} is {tensor.dtype!r}; only {kinds} are read"
                )
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as buffer:
            yield TensorFile(tensors, buffer)


def read_header(path: Path) -> tuple[Tensor, ...]:
    """The tensors of a base's file, of any type, without reading them. BadTensorFile unless they fill it exactly."""
    with path.open("rb") as file:
        return _announced(path, file, MAX_BASE_HEADER_BYTES)


def _announced(path: Path, file: BinaryIO, max_header_bytes: int) -> tuple[Tensor, ...]:
    size = path.stat().st_size
    head = file.read(8)
    if len(head) < 8:
        raise BadTensorFile(f"{path.name} is cut short: {size} bytes")
    length = struct.unpack("<Q", head)[0]
    if length > min(max_header_bytes, size - 8):
        raise BadTensorFile(f"{path.name}: a header of {length} bytes in a file of {size}, {max_header_bytes} at most")
    tensors = tuple(_tensors(path, _header(path, file.read(length)), 8 + length))
    _fill_exactly(path, tensors, 8 + length, size)
    return tensors


def _header(path: Path, data: bytes) -> dict[str, Any]:
    try:
        header = json.loads(data, object_pairs_hook=_no_doubles)
    except (ValueError, RecursionError) as error:
        raise BadTensorFile(f"{path.name}: the header is not JSON: {error}") from error
    if not isinstance(header, dict):
        raise BadTensorFile(f"{path.name}: the header is not an object")
    header.pop("__metadata__", None)
    return header


def _no_doubles(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a name stands in it twice")
    return found


def _tensors(path: Path, header: dict[str, Any], data_start: int) -> Iterator[Tensor]:
    for name, entry in header.items():
        try:
            dtype, shape, (start, end) = str(entry["dtype"]), tuple(entry["shape"]), entry["data_offsets"]
            numbers = (*shape, start, end)
        except (KeyError, TypeError, ValueError) as error:
            raise BadTensorFile(f"{path.name}: tensor {name[:200]!r} has no dtype, shape or offsets") from error
        if not all(type(number) is int and number >= 0 for number in numbers):
            raise BadTensorFile(f"{path.name}: tensor {name[:200]!r} has an impossible shape or offset")
        if end < start or (dtype in BYTES_OF and end - start != prod(shape) * BYTES_OF[dtype]):
            raise BadTensorFile(f"{path.name}: tensor {name[:200]!r} has {end - start} bytes for shape {list(shape)}")
        yield Tensor(name, dtype, shape, data_start + start, end - start)


def _fill_exactly(path: Path, tensors: tuple[Tensor, ...], data_start: int, size: int) -> None:
    """No gap, no overlap, nothing behind: hidden bytes would not be covered by a digest of the tensors."""
    place = data_start
    for tensor in sorted(tensors, key=lambda t: (t.start, t.size)):
        if tensor.start != place:
            raise BadTensorFile(f"{path.name}: tensor {tensor.name[:200]!r} overlaps another or leaves a gap")
        place += tensor.size
    if place != size:
        cut = f": {place - size} are missing, as after a download that was broken off" if size < place else ""
        raise BadTensorFile(f"{path.name}: {size} bytes where the header announces {place}{cut}")
