"""Loaded into the worker of a vLLM on CPU (`--worker-extension-cls`): LoRA products by adapter instead of by token.

vLLM 0.32's torch LoRA operators gather an adapter's weights once for every token, and index the slots with -1 for "no
adapter": a base request batched with adapter requests silently got the weights of the last slot, and unloading frees no
slot, so after `max_loras` loads in an engine's life the last one is never empty again. Here the tokens of one adapter
are multiplied at once, several times as fast, and rows without an adapter stay the base's. The self-test finds an
engine that lacks this.
"""

from __future__ import annotations

from collections.abc import Iterator
from importlib import import_module
from typing import Any

PLACES = ("vllm.lora.ops.torch_ops.lora_ops", "vllm.lora.ops.torch_ops", "vllm.lora.punica_wrapper.punica_cpu")


class BaseRows:
    """vLLM asks for a class; importing this module is what counts."""


def bgmv_shrink(inputs: Any, weights: Any, output: Any, lora_indices: Any, scaling: float = 1.0) -> None:
    """inputs (tokens, hidden) x A of each token's adapter; weights (slots, [1,] rank, hidden)."""
    for slot, rows in _by_adapter(lora_indices):
        if slot < 0:
            output[: lora_indices.shape[0]][rows] = 0
        else:
            a = weights[slot].reshape(weights.shape[-2:]).to(output.dtype)
            output[: lora_indices.shape[0], : a.shape[0]][rows] = scaling * (inputs[rows].to(output.dtype) @ a.T)


def bgmv_expand(inputs: Any, weights: Any, output: Any, lora_indices: Any, add_inputs: bool = True) -> None:
    """inputs (tokens, rank) x B; adapter and model may pad their outputs differently."""
    _expand(inputs, weights, output, lora_indices, add_inputs)


def bgmv_expand_slice(
    inputs: Any,
    weights: Any,
    output: Any,
    lora_indices: Any,
    slice_offset: int,
    slice_size: int,
    add_inputs: bool = True,
) -> None:
    """The same into a part of the columns: q, k and v, or gate and up, share one output."""
    _expand(inputs, weights, output[:, slice_offset : slice_offset + slice_size], lora_indices, add_inputs)


def _expand(inputs: Any, weights: Any, output: Any, lora_indices: Any, add_inputs: bool) -> None:
    columns = min(weights.shape[-2], output.shape[1])
    into = output[: lora_indices.shape[0], :columns]
    for slot, rows in _by_adapter(lora_indices):
        if slot < 0:
            if not add_inputs:
                into[rows] = 0
            continue
        b = weights[slot].reshape(weights.shape[-2:])[:columns].to(output.dtype)
        product = inputs[: lora_indices.shape[0]][rows].to(output.dtype) @ b.T
        if add_inputs:
            into[rows] += product
        else:
            into[rows] = product


def _by_adapter(lora_indices: Any) -> Iterator[tuple[int, Any]]:
    """(slot, its rows): a whole-tensor slice where all rows are of one adapter, else a mask."""
    slots = lora_indices.unique().tolist()
    if len(slots) == 1:
        yield int(slots[0]), slice(None)
        return
    for slot in slots:
        yield int(slot), lora_indices == slot


def _install() -> None:
    """Into every module that has imported the originals by name."""
    for place in PLACES:
        module: Any = import_module(place)
        for ours in (bgmv_shrink, bgmv_expand, bgmv_expand_slice):
            setattr(module, ours.__name__, ours)


_install()
