"""Which card, driver and libraries the trainer's Python sees, and what is wrong with them. No torch at import."""

from __future__ import annotations

import ctypes
import os
import platform
import re
import subprocess
from pathlib import Path
from typing import Any

from labeling.errors import NightschoolError
from loop.preflight.child_results import DeviceFacts
from loop.trainers.child import versions

DRIVER_FILE = Path("/proc/driver/nvidia/version")
DRIVER_LIBRARY = "libcuda.so.1"
DEVICES = Path("/dev")
TOOL_SECONDS = 20


class NoGpuSeen(NightschoolError):
    code = "no_gpu_seen"


class DriverTooOld(NightschoolError):
    code = "driver_too_old"


class DriverBroken(NightschoolError):
    code = "driver_broken"
    default_hint = "Restart the machine: mostly the driver was updated under a running one. `nvidia-smi` tells more."


class NoBitsandbytesLibrary(NightschoolError):
    code = "no_bitsandbytes_library"


def gather(torch: Any) -> DeviceFacts:
    """Fails on nothing: `diagnose` says what is wrong."""
    on_gpu = torch.cuda.is_available()
    free, total = _memory(torch) if on_gpu else (0, 0)
    return DeviceFacts(
        python=platform.python_version(),
        packages=versions(),
        device=torch.cuda.get_device_name() if on_gpu else "cpu",
        torch_cuda=torch.version.cuda or "",
        driver=driver_version(),
        driver_cuda=driver_cuda(),
        capability=".".join(map(str, torch.cuda.get_device_capability())) if on_gpu else "",
        bitsandbytes_library=_bitsandbytes_library(),
        memory_bytes=total,
        memory_free_bytes=free,
        others=processes(),
    )


def diagnose(facts: DeviceFacts, *, card_there: bool, needs_gpu: bool, needs_4bit: bool) -> None:
    """Raises what stops training, with cause and cure. `card_there`: the machine has an NVIDIA card, seen or not."""
    if facts.device == "cpu":
        _no_gpu(facts, card_there, needs_gpu)
    if not needs_4bit:
        return
    if "bitsandbytes" not in facts.packages:
        raise NoBitsandbytesLibrary(
            "the trainer's environment lacks bitsandbytes, which 4-bit training needs",
            hint='Install it there (nightschool[train] brings it), or set trainer.quantisation = "none".',
        )
    wanted = f"cuda{facts.torch_cuda.replace('.', '')}" if facts.device != "cpu" else "cpu"
    if wanted not in facts.bitsandbytes_library:
        have = ", ".join(bitsandbytes_libraries()) or "none"
        raise NoBitsandbytesLibrary(
            f"bitsandbytes {facts.packages['bitsandbytes']} has no library for {_words(wanted)}; it brings: {have}",
            hint="Install a bitsandbytes made for this torch's CUDA, or a torch built for one that it brings.",
        )


def _no_gpu(facts: DeviceFacts, card_there: bool, needs_gpu: bool) -> None:
    if not card_there:
        if needs_gpu:
            raise NoGpuSeen(
                "no GPU is seen, and this trainer needs one",
                hint='Set trainer.backend = "peft", which trains on a CPU, or run where a CUDA GPU is.',
            )
        return
    if not facts.torch_cuda:
        raise NoGpuSeen(
            f"the machine has a GPU, but torch {facts.packages.get('torch', '')} is built for CPUs alone",
            hint="Install a CUDA build of torch in the trainer's environment (`make setup-gpu`). To train on the CPU "
            'all the same, start Nightschool with CUDA_VISIBLE_DEVICES="".',
        )
    if facts.driver_cuda and _major(facts.driver_cuda) < _major(facts.torch_cuda):
        raise DriverTooOld(
            f"driver {facts.driver or '(unknown)'} runs CUDA {facts.driver_cuda} at most; torch "
            f"{facts.packages.get('torch', '')} is built for CUDA {facts.torch_cuda}",
            hint=f"Install a driver for CUDA {_major(facts.torch_cuda)} or newer, or a torch built for CUDA "
            f"{_major(facts.driver_cuda)}.",
        )
    if not facts.driver_cuda:
        raise DriverBroken(f"the machine has a GPU, but its driver {facts.driver or '(unknown)'} does not answer")
    raise NoGpuSeen(
        f"torch sees no GPU although driver {facts.driver or '(unknown)'} answers",
        hint="CUDA_VISIBLE_DEVICES or the container may hide it: `nvidia-smi` in the same place must list it.",
    )


def card_there(visible: str | None) -> bool:
    """`visible`: CUDA_VISIBLE_DEVICES. An empty one, or -1, hides every card on purpose."""
    if visible is not None and visible.strip() in {"", "-1"}:
        return False
    return any(re.fullmatch(r"nvidia\d+", path.name) for path in DEVICES.glob("nvidia[0-9]*"))


def driver_version() -> str:
    try:
        text = DRIVER_FILE.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return (_nvidia_smi("--query-gpu=driver_version").splitlines() or [""])[0].strip()
    found = re.search(r"\b(\d{3,}\.\d+(?:\.\d+)?)\b", text)
    return found[1] if found else ""


def processes() -> tuple[str, ...]:
    """What else holds memory of the card: `pid 812 (vllm, 60000 MiB)`. Empty in a container that does not see them."""
    lines = _nvidia_smi("--query-compute-apps=pid,process_name,used_memory").splitlines()
    fields = [[part.strip() for part in line.split(",")] for line in lines]
    others = [one for one in fields if len(one) == 3 and one[0] != str(os.getpid())]
    return tuple(f"pid {one[0]} ({Path(one[1]).name}, {one[2]} MiB)" for one in others)


def _nvidia_smi(query: str) -> str:
    command = ["nvidia-smi", query, "--format=csv,noheader,nounits"]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=TOOL_SECONDS, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return ""


def driver_cuda() -> str:
    """The newest CUDA that the driver runs, from its own library; "" where there is none that answers."""
    version = ctypes.c_int(0)
    try:
        failed = ctypes.CDLL(DRIVER_LIBRARY).cuDriverGetVersion(ctypes.byref(version))
    except (OSError, AttributeError):
        return ""
    return f"{version.value // 1000}.{version.value % 1000 // 10}" if not failed and version.value else ""


def _memory(torch: Any) -> tuple[int, int]:
    """Free and total bytes. On a full card torch can't even ask, for that alone takes some."""
    try:
        free, total = torch.cuda.mem_get_info()
        return int(free), int(total)
    except RuntimeError:
        told = re.findall(r"\d+", (_nvidia_smi("--query-gpu=memory.free,memory.total").splitlines() or [""])[0])
        return (int(told[0]) << 20, int(told[1]) << 20) if len(told) == 2 else (0, 0)


def _bitsandbytes_library() -> str:
    """The name of the native library in use; empty when it could not be loaded."""
    try:
        from bitsandbytes import cextension
    except Exception:  # noqa: BLE001 - a library that cannot be loaded raises what it likes
        return ""
    library = getattr(cextension.lib, "_lib", None)
    return Path(getattr(library, "_name", "") or "").name


def bitsandbytes_libraries() -> list[str]:
    """What the installed package brings."""
    from importlib.util import find_spec

    spec = find_spec("bitsandbytes")
    folders = list(spec.submodule_search_locations or ()) if spec else []
    return sorted(path.name for folder in folders for path in Path(folder).glob("libbitsandbytes_*.so"))


def _words(library: str) -> str:
    number = library.removeprefix("cuda")
    return "CPUs" if library == "cpu" else f"CUDA {number[:-1]}.{number[-1:]}"


def _major(version: str) -> int:
    return int(version.partition(".")[0])
