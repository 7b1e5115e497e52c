"""A step's numbers without waiting for them: they are read while the device works on the step after.

Reading a loss from a GPU as soon as its step is launched lets the GPU run dry, and idle until the next step's first
kernels come: 10 to 30 ms a step, of steps of 300 to 600.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import torch

SECONDS = "seconds"  # of the step, beside transformers' own names in what is logged


@dataclass(frozen=True)
class _Kept:
    numbers: torch.Tensor  # on the host: loss and gradient's norm
    ended: Any  # torch.cuda.Event, or the time of a clock
    learning_rate: float | None


class LateLog:
    """Of one step at a time."""

    def __init__(self) -> None:
        self._kept: _Kept | None = None
        self._before: Any = None  # the end of the last step that was taken

    def keep(self, loss: torch.Tensor, grad_norm: torch.Tensor | float, learning_rate: float | None) -> None:
        """Asks for the numbers of the step that was just launched."""
        norm = torch.as_tensor(grad_norm, dtype=torch.float32, device=loss.device)
        numbers = torch.stack([loss.detach().float().reshape(()), norm.reshape(())])
        if loss.device.type != "cuda":
            self._kept = _Kept(numbers, time.monotonic(), learning_rate)
            return
        host = torch.empty(2, pin_memory=True)
        host.copy_(numbers, non_blocking=True)
        ended = torch.cuda.Event(enable_timing=True)
        ended.record()
        self._kept = _Kept(host, ended, learning_rate)

    def take(self) -> dict[str, float] | None:
        """As transformers' trainer logs them, and the seconds since the step before ended; None where none is kept."""
        kept, self._kept = self._kept, None
        if kept is None:
            return None
        before, self._before = self._before, kept.ended
        logs = {} if kept.learning_rate is None else {"learning_rate": kept.learning_rate}
        if isinstance(kept.ended, float):
            seconds = None if before is None else kept.ended - before
        else:
            kept.ended.synchronize()
            seconds = None if before is None else before.elapsed_time(kept.ended) / 1000
        if seconds is not None:
            logs[SECONDS] = seconds
        logs["loss"], logs["grad_norm"] = kept.numbers.tolist()
        return logs


def late_log_for(device: torch.device) -> LateLog | None:
    """None where a number is there as soon as it is asked for."""
    return LateLog() if device.type == "cuda" else None
