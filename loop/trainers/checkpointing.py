"""Gradient checkpointing: a layer's activations are computed again in the backward pass. Whether they are is looked at.

What a model says of itself does not count: Unsloth's trainer turns checkpointing off as it is made and on again when
training begins, and a layer that is called in another way than its family's is never recomputed, whatever its flags.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint
from transformers.modeling_layers import GradientCheckpointingLayer

from labeling.errors import NightschoolError

MODES = ("on", "offload")
SWITCHED = "the backend's own gradient checkpointing was not in effect; the trainer's took its place"


class CheckpointingNotInEffect(NightschoolError):
    code = "checkpointing_not_in_effect"
    default_hint = 'Set trainer.backend = "peft", or trainer.checkpointing = "off" and a smaller trainer.micro_tokens.'


def recompute(model: Any, mode: str) -> None:
    """`model`: transformers' own, with or without an adapter on it. "on" keeps each layer's input, "offload" in host
    memory."""
    if mode not in MODES:
        return
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    inner._set_gradient_checkpointing(
        enable=True, gradient_checkpointing_func=_offloaded if mode == "offload" else _checkpoint
    )


def ready(model: Any) -> None:
    """Training mode, checkpointing included, as the model was loaded. Unsloth's models bring a switch of their own."""
    switch = getattr(model, "for_training", None)
    if switch is None:
        model.train()
        return
    switch(use_gradient_checkpointing=getattr(model, "_unsloth_gradient_checkpointing", None))


def ensure(model: Any, mode: str, step: Callable[[], object]) -> str:
    """Sees to it that layers are recomputed; what had to be done for it, empty if nothing.

    `step`: forward and backward of anything, the smaller the better. Raises CheckpointingNotInEffect.
    """
    if mode not in MODES or _recomputed(model, step) == 1.0:
        return ""
    recompute(model, mode)
    share = _recomputed(model, step)
    if share < 1.0:
        raise CheckpointingNotInEffect(
            f'checkpointing "{mode}" was asked for, but {1 - share:.0%} of the layers keep their activations'
        )
    return SWITCHED


def _recomputed(model: Any, step: Callable[[], object]) -> float:
    """The share of layers that were called within the backward pass."""
    layers = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    again: set[int] = set()

    def note(layer: Any, *_: Any) -> None:
        if torch._C._current_graph_task_id() != -1:  # torch's own checkpointing asks the same
            again.add(id(layer))

    hooks = [layer.register_forward_pre_hook(note) for layer in layers]
    try:
        step()
    finally:
        for hook in hooks:
            hook.remove()
    return len(again) / len(layers) if layers else 0.0


def _checkpoint(layer: Any, *inputs: Any, **named: Any) -> Any:
    return checkpoint(layer, *inputs, use_reentrant=False, **named)


def _offloaded(layer: Any, *inputs: Any, **named: Any) -> Any:
    """Within, the checkpoint's own hooks hold: only what it keeps, the layer's input, goes to host memory."""
    with torch.autograd.graph.save_on_cpu(pin_memory=torch.cuda.is_available()):
        return _checkpoint(layer, *inputs, **named)
