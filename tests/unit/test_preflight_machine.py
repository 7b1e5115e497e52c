"""Room, memory, disk and caches as a preflight sees them."""

from __future__ import annotations

from pathlib import Path

import pytest

from loop import machine_memory
from loop.executors import trainer_caches
from loop.plain_lora import expected_shapes, parameters
from loop.preflight.caches import known_caches, measure
from loop.preflight.machine import SPARE_BYTES, worst_case_bytes, write_speed
from loop.settings import LINEAR_LAYERS
from loop.trainers.spec import LoraSpec, TrainSpec, run_digest
from tests.adapters import TINY, weights_for
from tests.bases import write_base

MEMINFO = "MemTotal:       24000000 kB\nMemFree:  1 kB\nMemAvailable:   10000000 kB\n"


def spec_of(folder: Path, rank: int = 4) -> TrainSpec:
    base = folder / "base"
    if not base.exists():
        write_base(base)
    return TrainSpec(
        base_dir=base, base_name="b", base_digest="d", data_dir=folder, out_dir=folder / "out", lora=LoraSpec(rank=rank)
    )


def test_an_adapters_numbers_are_counted_as_they_are_written() -> None:
    """Against an adapter made elsewhere."""
    made = sum(values.size for values in weights_for(TINY, rank=4).values())
    assert parameters(TINY, LINEAR_LAYERS, 4) == made
    assert len(dict(expected_shapes(TINY, LINEAR_LAYERS, 4))) == len(weights_for(TINY, rank=4))


def test_the_worst_case_grows_with_rank_and_data(tmp_path: Path) -> None:
    """Three checkpoints of 12 bytes a number and four adapters of 2; three copies of the rows."""
    (tmp_path / "train.jsonl").write_bytes(bytes(1000))
    small, large = worst_case_bytes(spec_of(tmp_path)), worst_case_bytes(spec_of(tmp_path, rank=8))
    assert large - small == (3 * 12 + 4 * 2) * parameters(TINY, LINEAR_LAYERS, 4)
    assert small > SPARE_BYTES
    (tmp_path / "train.jsonl").write_bytes(bytes(2000))
    assert worst_case_bytes(spec_of(tmp_path)) == small + 3 * 1000


@pytest.mark.parametrize(
    ("limit", "used", "expected"),
    [
        ("max", 0, (10_240_000_000, "the machine's")),
        ("8000000000", 5_000_000_000, (3_500_000_000, "the container's limit")),
        ("99000000000", 5_000_000_000, (10_240_000_000, "the machine's")),
        (None, 0, (10_240_000_000, "the machine's")),
    ],
)
def test_memory_is_what_the_container_leaves_of_the_machines(
    tmp_path: Path, limit: str | None, used: int, expected: tuple[int, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its page cache gives way, and does not count as used."""
    (tmp_path / "meminfo").write_text(MEMINFO)
    monkeypatch.setattr(machine_memory, "PROC", tmp_path)
    monkeypatch.setattr(machine_memory, "CGROUP", tmp_path)
    if limit is not None:
        (tmp_path / "memory.max").write_text(f"{limit}\n")
        (tmp_path / "memory.current").write_text(f"{used}\n")
        (tmp_path / "memory.stat").write_text("anon 1\ninactive_file 500000000\n")
    assert machine_memory.available_memory() == expected


def test_the_disk_is_measured_and_left_as_it_was(tmp_path: Path) -> None:
    assert write_speed(tmp_path) > 1000
    assert list(tmp_path.iterdir()) == []


def test_caches_are_measured_within_their_time(tmp_path: Path) -> None:
    """Links are not followed; when time is up, what was counted is a lower bound."""
    folder = tmp_path / "cache" / "trainer"
    (folder / "deep").mkdir(parents=True)
    (folder / "deep" / "a").write_bytes(bytes(3000))
    (folder / "link").symlink_to(folder / "deep" / "a")
    (folder / "folders").symlink_to(folder / "deep")
    assert folder in known_caches(tmp_path)
    assert measure([folder, tmp_path / "gone"]) == {folder: (3000, False)}
    assert measure([folder], seconds=0) == {folder: (0, True)}


def test_what_a_trainer_compiles_lies_in_the_data_folder(tmp_path: Path) -> None:
    """Every variable its own folder, all of them below one that is watched."""
    places = trainer_caches(tmp_path)
    assert len(set(places.values())) == len(places) == 4
    assert {Path(place).parent for place in places.values()} == {tmp_path / "cache" / "trainer"}


def test_a_checkpoint_of_another_template_is_never_resumed(tmp_path: Path) -> None:
    """Where the template's file lies does not matter, what it says does."""
    (tmp_path / "train.jsonl").write_text("{}\n")
    spec = spec_of(tmp_path).model_copy(update={"template_digest": "sha256:1", "chat_template": tmp_path / "one"})
    moved = spec.model_copy(update={"chat_template": tmp_path / "two"})
    other = spec.model_copy(update={"template_digest": "sha256:2"})
    assert run_digest(spec) == run_digest(moved) != run_digest(other)
