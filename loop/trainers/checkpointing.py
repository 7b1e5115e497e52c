"""Gradient checkpointing for models of transformers: a layer's activations are computed again in the backward pass."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils.checkpoint import checkpoint


def recompute(model: Any, mode: str) -> None:
    """`model`: transformers' own, before an adapter is put on it. "on" keeps each layer's input, "offload" in host
    memory."""
    if mode not in {"on", "offload"}:
        return
    model._set_gradient_checkpointing(
        enable=True, gradient_checkpointing_func=_offloaded if mode == "offload" else _checkpoint
    )


def _checkpoint(layer: Any, *inputs: Any, **named: Any) -> Any:
    return checkpoint(layer, *inputs, use_reentrant=False, **named)


def _offloaded(layer: Any, *inputs: Any, **named: Any) -> Any:
    """Within, the checkpoint's own hooks hold: only what it keeps, the layer's input, goes to host memory."""
    with torch.autograd.graph.save_on_cpu(pin_memory=torch.cuda.is_available()):
        return _checkpoint(layer, *inputs, **named)
