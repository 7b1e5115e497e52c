"""Tokenised rows on disk: the same again, in shards, each with its digest, and never those of another run."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from loop.trainers import token_store
from loop.trainers.batches import Batches
from loop.trainers.rows import Example
from loop.trainers.token_store import MANIFEST, Manifest, kept

ROWS = [Example(f"row-{n}", tuple(range(n, 3 * n + 4)), n % 3 + 1, n % 2 == 0) for n in range(50)]


def _once() -> Callable[[], Iterator[Example]]:
    """To be asked a single time."""
    asked: list[bool] = []

    def make() -> Iterator[Example]:
        assert not asked
        asked.append(True)
        return iter(ROWS)

    return make


def _plain(examples: list[Example]) -> list[Example]:
    return [Example(one.id, tuple(map(int, one.tokens)), one.answer_start, one.replay) for one in examples]


def test_rows_come_back_as_they_were_and_are_made_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also in several batches and shards; what training makes of them is the same."""
    monkeypatch.setattr(token_store, "ROWS_AT_ONCE", 7)
    monkeypatch.setattr(token_store, "SHARD", "1KB")
    make = _once()
    first = kept(tmp_path / "tokens", "sha256:run", make)
    assert len(list((tmp_path / "tokens").glob("*.arrow"))) > 1
    again = kept(tmp_path / "tokens", "sha256:run", make)
    assert _plain(first) == _plain(again) == ROWS
    for packed in (False, True):
        (mine,), (theirs,) = (Batches(rows, 0, hold=True, packed=packed)([3, 8, 5]) for rows in (again, ROWS))
        assert mine.input_ids.tolist() == theirs.input_ids.tolist()
        assert (mine.targets.tolist(), mine.at.tolist()) == (theirs.targets.tolist(), theirs.at.tolist())
        assert (mine.held_rows, mine.total_held) == (theirs.held_rows, theirs.total_held)


def test_no_rows_are_no_rows(tmp_path: Path) -> None:
    """Pairs without replay."""
    assert kept(tmp_path / "tokens", "sha256:run", lambda: ()) == []


def _of_another_run(folder: Path) -> None:
    manifest = Manifest.model_validate_json((folder / MANIFEST).read_bytes())
    (folder / MANIFEST).write_text(manifest.model_copy(update={"run_digest": "sha256:other"}).model_dump_json())


def _damaged(folder: Path) -> None:
    shard = next(folder.glob("*.arrow"))
    shard.write_bytes(shard.read_bytes()[:-9] + bytes(9))


def _half_written(folder: Path) -> None:
    (folder / MANIFEST).unlink()


def _without_a_shard(folder: Path) -> None:
    next(folder.glob("*.arrow")).unlink()


@pytest.mark.parametrize("harm", [_of_another_run, _damaged, _half_written, _without_a_shard])
def test_what_can_not_be_trusted_is_made_anew(harm: Callable[[Path], None], tmp_path: Path) -> None:
    folder = tmp_path / "tokens"
    kept(folder, "sha256:run", lambda: ROWS[:3])
    harm(folder)
    assert _plain(kept(folder, "sha256:run", lambda: ROWS)) == ROWS
