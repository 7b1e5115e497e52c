"""Loaded into the worker of a vLLM on CPU (`--worker-extension-cls`): keeps adapters out of the base's rows.

vLLM 0.32's torch LoRA operators index the slots with -1 for "no adapter", so a base request batched with adapter
requests silently got the weights of the last slot, and unloading frees no slot: after `max_loras` loads in an engine's
life the last one is never empty again. Here those rows are zero. The self-test finds an engine that lacks this.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

PLACES = ("vllm.lora.ops.torch_ops.lora_ops", "vllm.lora.ops.torch_ops", "vllm.lora.punica_wrapper.punica_cpu")


class BaseRows:
    """vLLM asks for a class; importing this module is what counts."""


def _install() -> None:
    original = import_module(PLACES[0]).bgmv_shrink

    def bgmv_shrink(inputs: Any, weights: Any, output: Any, lora_indices: Any, scaling: float = 1.0) -> None:
        original(inputs, weights, output, lora_indices, scaling)
        output[: lora_indices.shape[0]][lora_indices < 0] = 0

    for place in PLACES:
        module: Any = import_module(place)
        module.bgmv_shrink = bgmv_shrink


_install()
