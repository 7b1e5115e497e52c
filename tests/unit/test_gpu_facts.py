"""Driver, CUDA, torch and bitsandbytes that do not go together: each mismatch with its cause and its cure."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from loop.preflight.child_results import DeviceFacts
from loop.trainers import gpu_facts
from loop.trainers.gpu_facts import (
    DriverBroken,
    DriverTooOld,
    NoBitsandbytesLibrary,
    NoGpuSeen,
    card_there,
    diagnose,
    driver_cuda,
    driver_version,
    processes,
)
from loop.trainers.smoke import CardTaken, KernelFailed, explained


def facts(**changed: Any) -> DeviceFacts:
    """An H100 on which everything fits."""
    fields: dict[str, Any] = {
        "python": "3.12.3",
        "packages": {"torch": "2.11.0+cu130", "bitsandbytes": "0.50.2"},
        "device": "NVIDIA H100 80GB HBM3",
        "torch_cuda": "13.0",
        "driver": "580.95.05",
        "driver_cuda": "13.0",
        "capability": "9.0",
        "bitsandbytes_library": "libbitsandbytes_cuda130.so",
        "memory_bytes": 80 * 2**30,
        "memory_free_bytes": 79 * 2**30,
        **changed,
    }
    return DeviceFacts(**fields)


def look(found: DeviceFacts, *, there: bool = True, needs_gpu: bool = True, needs_4bit: bool = True) -> None:
    diagnose(found, card_there=there, needs_gpu=needs_gpu, needs_4bit=needs_4bit)


CPU = {"device": "cpu", "driver": "", "driver_cuda": "", "torch_cuda": "", "capability": ""}


def test_what_fits_passes() -> None:
    """A card, and a CPU where none is needed."""
    look(facts())
    cpu = facts(**CPU, bitsandbytes_library="libbitsandbytes_cpu.so")
    look(cpu, there=False, needs_gpu=False)


@pytest.mark.parametrize(
    ("changed", "options", "kind", "said", "cure"),
    [
        (CPU, {"there": False}, NoGpuSeen, "no GPU is seen", 'trainer.backend = "peft"'),
        (CPU, {"needs_gpu": False}, NoGpuSeen, "is built for CPUs alone", "CUDA build of torch"),
        (
            {"device": "cpu", "driver": "550.54", "driver_cuda": "12.4"},
            {"needs_gpu": False},
            DriverTooOld,
            "driver 550.54 runs CUDA 12.4 at most; torch 2.11.0+cu130 is built for CUDA 13.0",
            "a driver for CUDA 13 or newer, or a torch built for CUDA 12",
        ),
        ({"device": "cpu", "driver_cuda": ""}, {}, DriverBroken, "driver 580.95.05 does not answer", "Restart"),
        ({"device": "cpu"}, {}, NoGpuSeen, "although driver 580.95.05 answers", "CUDA_VISIBLE_DEVICES"),
        (
            {"bitsandbytes_library": ""},
            {},
            NoBitsandbytesLibrary,
            "bitsandbytes 0.50.2 has no library for CUDA 13.0",
            "made for this torch's CUDA",
        ),
        (
            {"torch_cuda": "12.8", "bitsandbytes_library": "libbitsandbytes_cuda126.so"},
            {},
            NoBitsandbytesLibrary,
            "no library for CUDA 12.8",
            "made for this torch's CUDA",
        ),
        ({"packages": {"torch": "2.11.0"}}, {}, NoBitsandbytesLibrary, "lacks bitsandbytes", 'quantisation = "none"'),
    ],
)
def test_each_mismatch_has_its_cause_and_its_cure(
    changed: dict[str, Any], options: dict[str, Any], kind: type[Exception], said: str, cure: str
) -> None:
    with pytest.raises(kind) as refused:
        look(facts(**changed), **options)
    assert said in str(refused.value)
    assert cure in refused.value.hint  # type: ignore[attr-defined]


def test_bitsandbytes_counts_only_for_4_bit() -> None:
    """Without quantisation nothing of it is used."""
    look(facts(bitsandbytes_library="", packages={"torch": "2.11.0"}), needs_4bit=False)


def test_a_minor_step_of_cuda_is_no_mismatch() -> None:
    """Drivers run every build of their own major version."""
    look(facts(driver_cuda="13.0", torch_cuda="13.2", bitsandbytes_library="libbitsandbytes_cuda132.so"))
    with pytest.raises(NoGpuSeen, match="although driver"):  # versions are compared where no card is seen
        look(facts(device="cpu", driver_cuda="13.0", torch_cuda="13.2"))


def test_a_card_that_another_process_fills_is_told_with_that_process() -> None:
    full = facts(memory_free_bytes=2**30, others=("pid 812 (vllm, 79000 MiB)",))
    told = explained(RuntimeError("CUDA out of memory. Tried to allocate 20 MiB"), full)
    assert isinstance(told, CardTaken)
    assert "79.0 of 80.0 GiB are held by pid 812 (vllm, 79000 MiB)" in str(told)
    hidden = explained(RuntimeError("CUDA error: out of memory"), facts(memory_free_bytes=2**30))
    assert "another process (a container may hide which)" in str(hidden)


@pytest.mark.parametrize(
    ("said", "kind", "word"),
    [
        ("CUDA driver version is insufficient for CUDA runtime version", DriverTooOld, "580.95.05"),
        (
            "CUDA error: no kernel image is available for execution on the device",
            KernelFailed,
            "compute capability 9.0",
        ),
        ("Error named symbol not found at line 449 in file ops.cu", KernelFailed, "bitsandbytes 0.50.2"),
        ("", KernelFailed, "RuntimeError"),
    ],
)
def test_what_cuda_raises_is_put_into_words(said: str, kind: type[Exception], word: str) -> None:
    told = explained(RuntimeError(said), facts())
    assert isinstance(told, kind)
    assert word in str(told)
    assert told.hint


@pytest.mark.parametrize(
    ("name", "visible", "there"),
    [
        ("nvidia0", None, True),
        ("nvidia3", "3", True),
        ("nvidia0", "", False),
        ("nvidia0", "-1", False),
        ("nvidiactl", None, False),
        ("nvidia-uvm", None, False),
    ],
)
def test_cards_are_counted_by_their_device_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, visible: str | None, there: bool
) -> None:
    """Also one that a broken driver no longer lists; one that was hidden on purpose does not count."""
    (tmp_path / name).touch()
    monkeypatch.setattr(gpu_facts, "DEVICES", tmp_path)
    assert card_there(visible) is there


SMI = """#!/bin/sh
case "$1" in
  *driver_version*) echo 570.1.2;;
  *compute-apps*) echo "812, /x/bin/vllm, 79000"; echo "broken"; echo "$PPID, /usr/bin/python3, 500";;
esac
"""


def test_the_driver_is_read_where_the_kernel_tells_it_else_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A container often has only nvidia-smi; without it there is no driver, and no crash."""
    proc = tmp_path / "version"
    monkeypatch.setattr(gpu_facts, "DRIVER_FILE", proc)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(gpu_facts, "DRIVER_LIBRARY", "libcuda-of-no-machine.so.1")
    assert (driver_version(), driver_cuda(), processes()) == ("", "", ())
    tool = tmp_path / "nvidia-smi"
    tool.write_text(SMI)
    tool.chmod(0o755)
    assert driver_version() == "570.1.2"
    assert processes() == ("pid 812 (vllm, 79000 MiB)",)
    proc.write_text(
        "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.95.05  Release Build\nGCC version: 12"
    )
    assert driver_version() == "580.95.05"


DRIVER = "int cuDriverGetVersion(int *version) { *version = %s; return %s; }"


@pytest.mark.parametrize(
    ("told", "failed", "version"), [("12040", "0", "12.4"), ("13000", "0", "13.0"), ("0", "100", "")]
)
def test_the_drivers_own_library_says_which_cuda_it_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, told: str, failed: str, version: str
) -> None:
    """A library that is there and fails is a driver that does not answer."""
    compiler = shutil.which("cc")
    if compiler is None:
        pytest.skip("no C compiler on this machine")
    library = tmp_path / f"libcuda{told}.so"
    (tmp_path / "driver.c").write_text(DRIVER % (told, failed))
    subprocess.run([compiler, "-shared", "-o", library, tmp_path / "driver.c"], check=True)
    monkeypatch.setattr(gpu_facts, "DRIVER_LIBRARY", str(library))
    assert driver_cuda() == version


class FullCard:
    """torch on a card without a byte left: asking how much is free fails."""

    class cuda:
        @staticmethod
        def mem_get_info() -> tuple[int, int]:
            raise RuntimeError("CUDA error: out of memory")


def test_a_full_cards_memory_is_asked_elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As seen on an H100: torch itself needs some memory to ask."""
    tool = tmp_path / "nvidia-smi"
    tool.write_text("#!/bin/sh\necho '512, 81559'\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert gpu_facts._memory(FullCard) == (512 << 20, 81559 << 20)
    tool.unlink()
    assert gpu_facts._memory(FullCard) == (0, 0)
