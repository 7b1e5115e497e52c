"""A base that no card holds whole: each layer is shared out among the ranks and gathered while it is at work (FSDP2).

A layer is read, quantised and shared out before the next one is touched: a card needs room for its share and one layer,
the host for nothing but the files' pages. Adapters stay whole on every card and float32: they are small, and trained
as on one card. So do the embedding, the last norm and the head, which the loss reads.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from accelerate import init_empty_weights
from accelerate.utils import FullyShardedDataParallelPlugin
from bitsandbytes.nn import Linear4bit, Params4bit
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from transformers import AutoConfig, AutoModelForCausalLM

from labeling.errors import InvalidInput
from loop.trainers.checkpointing import recompute
from loop.trainers.peft import adapter_fields, attention, keep_trainable
from loop.trainers.planned_run import compute_dtype
from loop.trainers.served_base import PREFIX, Weights
from loop.trainers.spec import TrainSpec
from loop.trainers.team import team

NF4 = {"compress_statistics": True, "quant_type": "nf4"}
# Only floating numbers can be shared out, and 4-bit weights are none, but their bits can be called so. Not bfloat16, as
# is usual: on CUDA a gathered base then differed from the one put in. It is thought that FSDP's copy goes by way of
# float32, where whatever is no number in bfloat16, one pair of bytes in 128, comes back as the same one.
STORED_AS = torch.float32


class UnfitForSharding(InvalidInput):
    code = "unfit_for_sharding"
    default_hint = 'Set trainer.sharding = "replicate": each card holds the whole base then.'


def load_sharded(spec: TrainSpec, longest: int, plugin: FullyShardedDataParallelPlugin) -> Any:
    """The base with a fresh adapter on it, as `peft.load` gives it; its layers are shared out among the ranks."""
    device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
    model = _hollow(spec, attention(longest, on_gpu=device.type == "cuda"))
    layers = _layers(model)
    if spec.quantisation == "nf4":
        for layer in layers:
            _quantised(layer)
        model.is_loaded_in_4bit = True
    _with_stand_ins(model)
    recompute(model, spec.memory.checkpointing)
    keep_trainable(model)
    adapted = get_peft_model(model, LoraConfig(**adapter_fields(spec.lora)))
    _fill_and_share_out(adapted, layers, spec, device, plugin)
    return adapted


def _hollow(spec: TrainSpec, attention_kind: str) -> Any:
    """The base without weights; what it computes from its config is there."""
    config = AutoConfig.from_pretrained(spec.base_dir, local_files_only=True, trust_remote_code=False)
    with init_empty_weights(include_buffers=False):
        model = AutoModelForCausalLM.from_config(config, dtype=compute_dtype(), attn_implementation=attention_kind)
    return model.requires_grad_(False)


def _layers(model: Any) -> list[nn.Module]:
    """What its family never splits: a decoder layer each."""
    found = [module for module in model.modules() if type(module).__name__ in model._no_split_modules]
    if not found:
        raise UnfitForSharding(f"{type(model).__name__} does not say what its layers are")
    return found


def _quantised(layer: nn.Module) -> None:
    for name, module in list(layer.named_modules()):
        if type(module) is nn.Linear:
            bias = module.bias is not None
            with torch.device("meta"):
                linear = Linear4bit(
                    *(module.in_features, module.out_features, bias, compute_dtype()),
                    **NF4,
                    quant_storage=STORED_AS,
                )
            linear.requires_grad_(False)
            layer.set_submodule(name, linear)


def _with_stand_ins(model: Any) -> None:
    """Weights of the right shape on the host that take no room: adapters are made beside them, in the usual order."""
    made: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for name, weight in list(module.named_parameters(recurse=False)):
            if id(weight) not in made:
                if isinstance(module, Linear4bit) and name == "weight":
                    empty = torch.zeros((), dtype=torch.uint8).expand(weight.shape)
                    made[id(weight)] = Params4bit(empty, requires_grad=False, **NF4, module=module)
                else:
                    empty = torch.zeros((), dtype=weight.dtype).expand(weight.shape)
                    made[id(weight)] = nn.Parameter(empty, requires_grad=False)
            setattr(module, name, made[id(weight)])


def _fill_and_share_out(
    adapted: Any,
    layers: list[nn.Module],
    spec: TrainSpec,
    device: torch.device,
    plugin: FullyShardedDataParallelPlugin,
) -> None:
    weights, filled = Weights(spec.base_dir), dict[int, nn.Parameter]()
    mesh = init_device_mesh(device.type, (team().size,))
    sample: tuple[nn.Module, str, torch.Tensor] | None = None
    names = {id(module): name for name, module in adapted.named_modules()}
    for layer in layers:
        for name, module in layer.named_modules():
            _fill(module, f"{names[id(layer)]}.{name}", weights, device, filled)
        sample = sample or _sample(layer)
        fully_shard(
            layer,
            mesh=mesh,
            reshard_after_forward=bool(plugin.reshard_after_forward),
            ignored_params={weight for weight in layer.parameters() if weight.requires_grad},
        )
    within = {id(module) for layer in layers for module in layer.modules()}
    for name, module in adapted.named_modules():
        if id(module) not in within:
            _fill(module, name, weights, device, filled)
    of_layers = {id(weight) for layer in layers for weight in layer.parameters()}
    rest = {weight for weight in adapted.parameters() if id(weight) not in of_layers or weight.requires_grad}
    fully_shard(adapted.get_base_model().base_model, mesh=mesh, ignored_params=rest)
    if sample is not None:
        _same_when_gathered(*sample)


def _sample(layer: nn.Module) -> tuple[nn.Module, str, torch.Tensor] | None:
    """The layer, the name of its first weight in 4 bits, and that weight's bytes."""
    for name, module in layer.named_modules():
        if isinstance(module, Linear4bit):
            return layer, f"{name}.weight", module.weight.detach().view(torch.uint8).clone()
    return None


def _same_when_gathered(layer: Any, name: str, stored: torch.Tensor) -> None:
    """To the bit. A copy that takes the bytes for numbers may change them without a word, and the base with them."""
    layer.unshard()
    gathered = layer.get_parameter(name).detach().view(torch.uint8)
    same = torch.equal(gathered, stored)
    layer.reshard()
    if not same:
        raise UnfitForSharding("a 4-bit layer that was shared out is not the same when it is gathered again")


def _fill(
    module: nn.Module, name: str, weights: Weights, device: torch.device, filled: dict[int, nn.Parameter]
) -> None:
    """The module's own weights and buffers onto the device; `filled`: of those that several modules share."""
    for key, buffer in list(module.named_buffers(recurse=False)):
        module._buffers[key] = buffer.to(device)
    for key, weight in list(module.named_parameters(recurse=False)):
        if weight.requires_grad:
            weight.data = weight.data.to(device)
            continue
        if id(weight) not in filled:
            filled[id(weight)] = _read(module, key, _candidates(f"{name}.{key}"), weights, weight, device)
        module._parameters[key] = filled[id(weight)]


def _read(
    module: nn.Module, key: str, names: Iterator[str], weights: Weights, stand_in: nn.Parameter, device: torch.device
) -> nn.Parameter:
    tried = list(names)
    name = next((one for one in tried if one in weights), None)
    if name is None:
        raise UnfitForSharding(f"the base's files hold no tensor {tried[0]}")
    read = weights[name]
    if read.shape != stand_in.shape:
        raise UnfitForSharding(f"{name} has the shape {tuple(read.shape)}, where {tuple(stand_in.shape)} is expected")
    read = read.to(device, compute_dtype())
    if not (isinstance(module, Linear4bit) and key == "weight"):
        return nn.Parameter(read, requires_grad=False)
    packed = Params4bit(read, requires_grad=False, **NF4, quant_storage=STORED_AS, module=module).to(device)
    # A plain one: bitsandbytes finds what belongs to it in the module, each time that the layer has been gathered.
    return nn.Parameter(packed.data.as_subclass(torch.Tensor), requires_grad=False)


def _candidates(name: str) -> Iterator[str]:
    """As transformers names it, without what adapters have put around it; a head that is tied is the embedding."""
    plain = name.removeprefix(PREFIX).replace(".base_layer.", ".").replace("..", ".")
    yield plain
    if plain == "lm_head.weight":
        yield "model.embed_tokens.weight"
