"""The last steps on the base as it is served: 4-bit layers give way to the unquantised ones that production runs.

An adapter trained on a quantised base and served on another one has learnt that base's rounding too; a short finish on
the served weights takes it out again (docs/recipe.md has the figures).
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from bitsandbytes.nn import Linear4bit
from safetensors import safe_open
from torch import nn
from transformers import TrainerCallback

from loop.base_weights import INDEX
from loop.machine_memory import meminfo
from loop.trainers.team import team

PREFIX = "base_model.model."  # peft's
ROOM = 1.2  # beside the weights themselves


class FinishOnServedBase(TrainerCallback):
    """From `first_step` (counted from 0) to `total`; also after a resume. A run that ends early says so by `due`."""

    def __init__(
        self,
        model: Any,
        base_dir: Path,
        dtype: torch.dtype,
        first_step: int,
        total: int,
        due: Callable[[], bool] = lambda: False,
        room: Callable[[], int] | None = None,
        on_exchange: Callable[[], None] = lambda: None,
    ) -> None:
        self._room = room  # bytes that the memory plan's budget leaves; None: only what is free counts
        self._on_exchange = on_exchange
        self._model, self._base_dir, self._dtype = model, base_dir, dtype
        self._first, self.total, self._due = first_step, total, due
        self._swapped: bool | None = None

    @property
    def steps(self) -> int:
        """How many were trained so; 0 where the weights did not fit."""
        return self.total - self._first if self._swapped else 0

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self._swapped is None and (state.global_step >= self._first or self._due()):
            self._first = min(self._first, state.global_step)
            fits = bool(team().least(_fits(self._model, self._room)))  # on every card, or on none
            self._swapped = fits and unquantise(self._model, self._base_dir, self._dtype) > 0
            if self._swapped:
                self._on_exchange()


def unquantise(model: Any, base_dir: Path, dtype: torch.dtype) -> int:
    """Replaces every 4-bit layer below an adapter by the base's own weights; how many. The adapter stays as it is."""
    weights = Weights(base_dir)
    replaced = 0
    for name, module in list(model.named_modules()):
        if not isinstance(module, Linear4bit):
            continue
        path = name.removeprefix(PREFIX).removesuffix(".base_layer")
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, _plain(module, path, weights, dtype))
        replaced += 1
    return replaced


def _plain(layer: Linear4bit, path: str, weights: Weights, dtype: torch.dtype) -> nn.Linear:
    device = layer.weight.device
    plain = nn.Linear(layer.in_features, layer.out_features, bias=layer.bias is not None, device="meta", dtype=dtype)
    plain.weight = nn.Parameter(weights[f"{path}.weight"].to(device, dtype), requires_grad=False)
    if layer.bias is not None:
        plain.bias = nn.Parameter(layer.bias.data.to(dtype), requires_grad=False)
    return plain


class Weights:
    """Tensors of a folder of safetensors, one file or sharded, read one at a time."""

    def __init__(self, folder: Path) -> None:
        index = folder / INDEX
        self._folder = folder
        self._files = json.loads(index.read_bytes())["weight_map"] if index.exists() else {}

    def __contains__(self, name: str) -> bool:
        if self._files:
            return name in self._files
        with safe_open(self._folder / "model.safetensors", "pt") as file:
            return name in file.keys()  # noqa: SIM118 - it is no mapping

    def __getitem__(self, name: str) -> torch.Tensor:
        with safe_open(self._folder / self._files.get(name, "model.safetensors"), "pt") as file:
            tensor: torch.Tensor = file.get_tensor(name)
            return tensor


def _fits(model: Any, room: Callable[[], int] | None) -> bool:
    """Whether the unquantised layers fit into what is free now, and into the budget."""
    layers = [module for module in model.modules() if isinstance(module, Linear4bit)]
    needed = ROOM * sum(2 * layer.in_features * layer.out_features for layer in layers)
    return needed < min(_free_bytes(model.device), room() if room else _free_bytes(model.device))


def _free_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return meminfo("MemAvailable")
