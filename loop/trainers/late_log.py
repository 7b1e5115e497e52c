"""A step's numbers without waiting for them: they are read while the device works on the step after.

Reading a loss from a GPU as soon as its step is launched lets the GPU run dry, and idle until the next step's first
kernels come: 10 to 30 ms a step, of steps of 300 to 600.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class _Kept:
    numbers: torch.Tensor  # on the host: loss and gradient's norm
    arrived: Any  # torch.cuda.Event
    learning_rate: float | None


class LateLog:
    """Of one step at a time."""

    def __init__(self) -> None:
        self._kept: _Kept | None = None

    def keep(self, loss: torch.Tensor, grad_norm: torch.Tensor | float, learning_rate: float | None) -> None:
        """Asks for the numbers of the step that was just launched."""
        norm = torch.as_tensor(grad_norm, dtype=torch.float32, device=loss.device)
        numbers = torch.stack([loss.detach().float().reshape(()), norm.reshape(())])
        if loss.device.type != "cuda":
            self._kept = _Kept(numbers, None, learning_rate)
            return
        host = torch.empty(2, pin_memory=True)
        host.copy_(numbers, non_blocking=True)
        arrived = torch.cuda.Event()
        arrived.record()
        self._kept = _Kept(host, arrived, learning_rate)

    def take(self) -> dict[str, float] | None:
        """As transformers' trainer logs them; None where nothing is kept."""
        kept, self._kept = self._kept, None
        if kept is None:
            return None
        if kept.arrived is not None:
            kept.arrived.synchronize()
        loss, norm = kept.numbers.tolist()
        rate = {} if kept.learning_rate is None else {"learning_rate": kept.learning_rate}
        return {"loss": loss, "grad_norm": norm} | rate


def late_log_for(device: torch.device) -> LateLog | None:
    """None where a number is there as soon as it is asked for."""
    return LateLog() if device.type == "cuda" else None
