"""A run's rows as tokens, kept in the format of Hugging Face's `datasets`: Arrow files in shards, mapped into memory.

They are made once: a trainer that resumes, takes a smaller plan or is one of several ranks reads them. A token takes
four bytes, which the machine may drop and read again.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable, Sequence
from itertools import islice, pairwise
from pathlib import Path
from typing import Any

import datasets
from pydantic import ValidationError

from labeling.settings import Strict
from loop.digests import digest_file, write_durably
from loop.trainers.rows import Example
from loop.trainers.team import team

FOLDER, MANIFEST = "tokens", "manifest.json"
SHARD = "256MB"
ROWS_AT_ONCE = 10_000
FEATURES = datasets.Features(
    {
        "id": datasets.Value("string"),
        "tokens": datasets.List(datasets.Value("int32")),
        "answer_start": datasets.Value("int32"),
        "replay": datasets.Value("bool"),
    }
)


class Manifest(Strict):
    """Written last: without it, or with another run's, the folder counts for nothing."""

    run_digest: str
    files: dict[str, str]  # name: digest


def kept(folder: Path, run_digest: str, make: Callable[[], Iterable[Example]]) -> list[Example]:
    """The run's examples, their tokens mapped from `folder`. The first rank makes them where there are none, none of
    this run, or damaged ones; the others wait for it."""
    if team().leads and not _whole(folder, run_digest):
        _write(folder, run_digest, make())
    team().wait()
    return _read(folder)


def _whole(folder: Path, run_digest: str) -> bool:
    try:
        manifest = Manifest.model_validate_json((folder / MANIFEST).read_bytes())
        return manifest.run_digest == run_digest and manifest.files == _digests(folder)
    except (OSError, ValidationError):
        return False


def _digests(folder: Path) -> dict[str, str]:
    return {path.name: digest_file(path) for path in sorted(folder.iterdir()) if path.name != MANIFEST}


def _write(folder: Path, run_digest: str, examples: Iterable[Example]) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    datasets.disable_progress_bars()
    remaining, parts = iter(examples), []
    while some := list(islice(remaining, ROWS_AT_ONCE)):
        parts.append(_columns(some))
    folder.mkdir(parents=True)
    if parts:  # datasets saves one without rows, but does not load it
        datasets.concatenate_datasets(parts).save_to_disk(str(folder), max_shard_size=SHARD)
    manifest = Manifest(run_digest=run_digest, files=_digests(folder))
    write_durably(folder / MANIFEST, manifest.model_dump_json(indent=1).encode())


def _columns(rows: Sequence[Example]) -> Any:
    columns = {name: [getattr(row, name) for row in rows] for name in FEATURES}
    return datasets.Dataset.from_dict(columns, features=FEATURES)


def _read(folder: Path) -> list[Example]:
    if not list(folder.glob("*.arrow")):
        return []
    table = datasets.load_from_disk(str(folder)).data
    tokens: list[Any] = []
    for chunk in table.column("tokens").chunks:
        mapped = chunk.values.to_numpy()
        tokens += [mapped[first:end] for first, end in pairwise(chunk.offsets.to_numpy())]
    columns = (table.column(name).to_pylist() for name in ("id", "answer_start", "replay"))
    return [Example(name, own, start, replay) for own, name, start, replay in zip(tokens, *columns, strict=True)]
