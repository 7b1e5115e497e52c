"""Full fine-tuning of the target layers' weights, kept as the base's weight and its change.

The numbers are those of training the weight itself in float32. Kept apart, the base stays what it is: the KL of replay
rows and the reference of dpo and kto are the same model with its changes switched off, as with an adapter, and only the
change is written into checkpoints. Of the change an adapter is extracted in the end (`extraction.py`), since nothing
else is served; what no adapter can carry, embeddings, norms and the head, is not trained.

To peft each change is an adapter without a rank (its developer guide, "custom models").
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file
from torch import nn
from torch.nn import functional

from labeling.errors import InvalidInput
from loop.trainers.peft import adapter_fields
from loop.trainers.spec import LoraSpec

ADAPTER = "default"  # peft's name for the first one


class NotPlain(InvalidInput):
    code = "not_plain_layers"
    default_hint = 'Set trainer.finetuning_type = "lora", or other trainer.target_modules.'


class ChangedLinear(nn.Module, LoraLayer):
    """A frozen linear layer with a trained change (outputs x inputs, float32) of its weight, at first 0."""

    adapter_layer_names = ("lora_change",)  # peft trains, saves and loads what is called lora_…

    def __init__(self, base_layer: nn.Linear, adapter_name: str, **_: Any) -> None:
        super().__init__()
        LoraLayer.__init__(self, base_layer)
        change = torch.zeros_like(base_layer.weight, dtype=torch.float32)
        self.lora_change = nn.ParameterDict({adapter_name: nn.Parameter(change)})
        self.set_adapter([adapter_name])

    @property
    def change(self) -> torch.Tensor:
        found: torch.Tensor = self.lora_change[ADAPTER]
        return found

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.disable_adapters:
            result: torch.Tensor = self.base_layer(x)
            return result
        weight = self.base_layer.weight
        changed: torch.Tensor = _Product.apply(x.to(weight.dtype), weight, self.base_layer.bias, self.change)
        return changed


class _Product(torch.autograd.Function):
    """Of the input with base + change; keeps neither their sum nor a copy of the change in the products' dtype.

    In bfloat16 the change has a product of its own, as the adapter has where it is served: added to the base's weight,
    whose last digit is larger than most of what is learnt, it would be rounded away.
    """

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, base: torch.Tensor, bias: torch.Tensor | None, change: torch.Tensor
    ) -> torch.Tensor:
        ctx.save_for_backward(x, base, change)
        if base.dtype == torch.float32:
            return functional.linear(x, base + change, bias)
        return functional.linear(x, base, bias) + functional.linear(x, change.to(base.dtype))

    @staticmethod
    def backward(ctx: Any, *slopes: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, base, change = ctx.saved_tensors
        (slope,) = slopes
        of_x = slope @ (base + change).to(base.dtype) if ctx.needs_input_grad[0] else None
        of_change = slope.flatten(0, -2).t() @ x.flatten(0, -2) if ctx.needs_input_grad[3] else None
        return of_x, None, None, None if of_change is None else of_change.float()


def with_changes(model: Any, lora: LoraSpec) -> Any:
    """`model`, unquantised, in peft's wrapper; its configuration is that of the adapter to be extracted. NotPlain."""
    config = LoraConfig(**adapter_fields(lora) | {"lora_dropout": 0.0})
    config._register_custom_module({nn.Linear: ChangedLinear})
    wrapped = get_peft_model(model, config)
    changes = {id(layer.change) for _, layer in changed_layers(wrapped)}
    others = [name for name, weight in wrapped.named_parameters() if weight.requires_grad and id(weight) not in changes]
    if others:
        raise NotPlain(f"{others[0].partition('.lora_')[0]} is no plain linear layer, whose weight could be trained")
    return wrapped


def changed_layers(model: Any) -> Iterator[tuple[str, ChangedLinear]]:
    """By the names that peft gives their tensors."""
    return ((name, module) for name, module in model.named_modules() if isinstance(module, ChangedLinear))


def put_adapter(model: Any, path: Path, scaling: float) -> None:
    """What an adapter of these very layers changes, into the changes: to go on from it."""
    weights = load_file(path)
    with torch.no_grad():
        for name, layer in changed_layers(model):
            a, b = (weights[f"{name}.lora_{side}.weight"].to(layer.change.device, torch.float32) for side in "AB")
            layer.change.copy_(scaling * (b @ a))
