"""A file to import, in batches of whole lines: plain or gzip, from any line on, never more than a batch in memory."""

from __future__ import annotations

import gzip
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from io import BufferedReader
from pathlib import Path
from typing import Protocol

from labeling.errors import InvalidInput

GZIP = b"\x1f\x8b"


class UnreadableFile(InvalidInput):
    code = "unreadable_file"


@dataclass(frozen=True)
class Batch:
    """`lines` as they go to the API, `body`; `line` and `offset`: where the next batch begins.

    `too_long`: numbers of lines that no request can hold. `read`: bytes of the file taken so far, packed ones counted.
    """

    first_line: int
    body: bytes
    line: int
    offset: int
    too_long: tuple[int, ...]
    read: int


class Source(Protocol):
    """`start`: (line, offset) of a batch that was the last one stored."""

    path: Path

    def batches(self, start: tuple[int, int], lines: int, size: int, longest: int) -> Iterator[Batch]: ...


class JsonLines:
    def __init__(self, path: Path) -> None:
        self.path = path

    def batches(self, start: tuple[int, int], lines: int, size: int, longest: int) -> Iterator[Batch]:
        """At most `lines` lines and about `size` bytes each. A line above `longest` bytes is passed over by number.

        It keeps its place as an empty line, so that the others keep their numbers.
        """
        first, offset = start
        with _opened(self.path) as (raw, file):
            file.seek(offset)
            number = first
            taken: list[bytes] = []
            held = 0
            too_long: list[int] = []
            while line := file.readline(longest):
                offset += len(line)
                if len(line) == longest and not line.endswith(b"\n"):
                    offset += _pass_line(file)
                    too_long.append(number)
                    line = b"\n"
                taken.append(line if line.endswith(b"\n") else line + b"\n")
                held += len(line)
                number += 1
                if len(taken) == lines or held >= size:
                    yield Batch(first, b"".join(taken), number, offset, tuple(too_long), raw.tell())
                    first, taken, held, too_long = number, [], 0, []
            if taken:
                yield Batch(first, b"".join(taken), number, offset, tuple(too_long), raw.tell())


@contextmanager
def _opened(path: Path) -> Iterator[tuple[BufferedReader, BufferedReader | gzip.GzipFile]]:
    """The file, and what is in it: the two are one where it is not packed."""
    try:
        with path.open("rb") as raw:
            packed = raw.read(2) == GZIP
            raw.seek(0)
            yield raw, gzip.GzipFile(fileobj=raw) if packed else raw
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise UnreadableFile(
            f"{path} is a broken gzip file: {error}", hint="What came before the break is stored; get the file again."
        ) from None
    except OSError as error:
        raise UnreadableFile(f"cannot read {path}: {error.strerror or error}") from None


def _pass_line(file: BufferedReader | gzip.GzipFile) -> int:
    """To its end; how many bytes."""
    passed = 0
    while part := file.readline(1 << 20):
        passed += len(part)
        if part.endswith(b"\n"):
            break
    return passed
