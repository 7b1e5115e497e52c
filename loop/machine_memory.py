"""How much memory this machine has to give: its cards', or its own within the control group. No torch."""

from __future__ import annotations

import os
import subprocess
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

CGROUP = Path("/sys/fs/cgroup")
PROC = Path("/proc")
QUERY = ("nvidia-smi", "--query-gpu=memory.total,memory.free,name", "--format=csv,noheader,nounits")
LIST = ("nvidia-smi", "--query-gpu=index", "--format=csv,noheader")
SECONDS_TO_ASK = 20


@dataclass(frozen=True)
class Machine:
    """Where a training runs. `free` and `total` bytes; `compute_bytes` of a number in a matrix product."""

    device: Literal["cuda", "cpu"]
    name: str
    total: int
    free: int
    compute_bytes: int

    def budget(self, budget_gib: float | None, share: float) -> int:
        """What the training may take: the setting, as far as it is there, or a share of what is free."""
        return min(int(budget_gib * 2**30), self.free) if budget_gib is not None else int(share * self.free)


def this_machine(cards: int = 1) -> Machine:
    """The card that a trainer started here would use, the fullest of several, else the host, shared by as many."""
    there = [card for card in (_card(named) for named in _named_cards(cards)) if card is not None]
    if there:
        return min(there, key=lambda card: card.free)
    here = host()
    return replace(here, free=here.free // cards)


def host() -> Machine:
    flags = (PROC / "cpuinfo").read_text(encoding="ascii", errors="replace")
    return Machine("cpu", "host memory", meminfo("MemTotal"), available_bytes(), 2 if "avx512_bf16" in flags else 4)


def available_bytes() -> int:
    """What could be allocated now without swapping, also inside a container with a limit."""
    return available_memory()[0]


def available_memory() -> tuple[int, str]:
    """The same, and whose limit it is."""
    free = meminfo("MemAvailable")
    limit, used = _number(CGROUP / "memory.max"), _number(CGROUP / "memory.current")
    if limit is None or used is None:
        return free, "the machine's"
    left = max(0, limit - used + _statistic(CGROUP / "memory.stat", "inactive_file"))  # the page cache gives way
    return (left, "the container's limit") if left < free else (free, "the machine's")


def oom_kills() -> int:
    """How often the kernel has killed a process for memory: more after a child's death than before tell why it died."""
    return _statistic(PROC / "vmstat", "oom_kill") + _statistic(CGROUP / "memory.events", "oom_kill")


def visible_card() -> str | None:
    """The card of a process that is started here, as CUDA_VISIBLE_DEVICES names it; None where that hides them all."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0].strip()
    return None if visible in {"", "-1"} else visible


def visible_cards() -> list[str]:
    """All that a process started here may use, as CUDA_VISIBLE_DEVICES names them; none where there is no driver."""
    there = _asked(LIST)
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    if named is None or not there:
        return there
    wanted = [name.strip() for name in named.split(",")]
    for place, name in enumerate(wanted):  # CUDA itself stops at the first that is none
        if name in {"", "-1"} or (name.isdigit() and name not in there):
            return wanted[:place]
    return wanted


def _named_cards(cards: int) -> list[str]:
    if cards > 1:
        return visible_cards()[:cards]
    visible = visible_card()
    return [] if visible is None else [visible]


def _card(named: str) -> Machine | None:
    """None: no card, or a driver that does not answer; the trainer will say what it finds."""
    try:
        total, free, name = (part.strip() for part in _asked((*QUERY, f"--id={named}"))[0].split(",", 2))
        return Machine("cuda", name, int(total) * 2**20, int(free) * 2**20, 2)
    except (ValueError, IndexError):
        return None


def _asked(command: tuple[str, ...]) -> list[str]:
    """The lines that it prints; none where it fails."""
    try:
        told = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS_TO_ASK, check=True)
    except (OSError, subprocess.SubprocessError):
        return []
    return told.stdout.splitlines()


def meminfo(key: str) -> int:
    """Bytes."""
    for line in (PROC / "meminfo").read_text(encoding="ascii").splitlines():
        if line.startswith(f"{key}:"):
            return int(line.split()[1]) * 1024
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES")


def _number(path: Path) -> int | None:
    """None where there is no such file, or it says "max"."""
    try:
        return int(path.read_text(encoding="ascii"))
    except (OSError, ValueError):
        return None


def _statistic(path: Path, key: str) -> int:
    try:
        lines = path.read_text(encoding="ascii").splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) for line in lines if line.split()[:1] == [key]), 0)
