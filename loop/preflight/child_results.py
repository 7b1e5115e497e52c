"""What the two looks into the trainer's environment leave behind. Both sides read this module; no torch here."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from labeling.settings import Strict

AUDIT_FILE, SMOKE_FILE = "audit.json", "smoke.json"


class Rendered(Strict):
    """A conversation in the trainer's template and tokens; `answered`: its last message is the assistant's."""

    messages: tuple[dict[str, Any], ...]
    answered: bool
    tokens: tuple[int, ...]


class Audit(Strict):
    """`rendered` is what an engine must repeat, token for token; `differences` are harmless, `warnings` are not."""

    rows: int
    stop_ids: tuple[int, ...]
    rendered: tuple[Rendered, ...]
    differences: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()


class DeviceFacts(Strict):
    """What the trainer's own Python sees. Empty texts: there is none. Memory in bytes, of the accelerator."""

    python: str
    packages: dict[str, str]
    device: str  # "NVIDIA H100 80GB HBM3", or cpu
    torch_cuda: str = ""  # CUDA of torch's build
    driver: str = ""
    driver_cuda: str = ""  # the newest CUDA that this driver runs
    capability: str = ""  # 9.0
    bitsandbytes_library: str = ""
    memory_bytes: int = 0
    memory_free_bytes: int = 0
    others: tuple[str, ...] = ()  # processes that hold memory of the card


class Smoke(Strict):
    """`off` is the 4-bit product against the same product of the weights taken out of 4 bits, relative."""

    facts: DeviceFacts
    seconds: float
    off: float


def audit_path(folder: Path) -> Path:
    return folder / AUDIT_FILE


def smoke_path(folder: Path) -> Path:
    return folder / SMOKE_FILE
