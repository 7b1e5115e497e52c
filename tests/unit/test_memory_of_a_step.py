"""What autograd really keeps is what the estimate counts; checkpointing changes memory, not the step."""

from __future__ import annotations

from typing import Any, Literal

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from loop import memory_estimate
from loop.memory_estimate import Setup, Workload, estimate, kept_per_token
from loop.model_shape import ALL_LAYERS, shape_of
from loop.trainers import base_states, head_loss
from loop.trainers.checkpointing import recompute
from loop.trainers.full_finetuning import with_changes
from loop.trainers.spec import LoraSpec

ROWS, LENGTH = 3, 96
SHAPE = {
    "vocab_size": 512,
    "hidden_size": 128,
    "intermediate_size": 352,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
}


def _model(mode: str, *, full: bool = False) -> Any:
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**SHAPE, attn_implementation="sdpa"))
    recompute(model, mode)
    if full:
        return with_changes(model.to(torch.bfloat16), LoraSpec(rank=2)).train()
    model = get_peft_model(model, LoraConfig(r=2, target_modules=list(ALL_LAYERS), task_type="CAUSAL_LM"))
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.1)
    return model.train()


def _step(model: Any, autocast: bool = False) -> tuple[float, list[torch.Tensor], int]:
    """Loss, gradients, and the bytes that autograd kept for the backward pass of the layers, weights left out."""
    ids = torch.randint(0, 512, (ROWS, LENGTH), generator=torch.Generator().manual_seed(1))
    own = {weight.untyped_storage().data_ptr() for weight in model.parameters()}
    kept: dict[int, torch.UntypedStorage] = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage
        return tensor

    with (
        torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor),
        torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast),
    ):
        states = model.get_base_model().base_model(input_ids=ids, use_cache=False).last_hidden_state
    loss = states.float().pow(2).mean()
    loss.backward()
    gradients = [weight.grad for weight in model.parameters() if weight.grad is not None]
    return float(loss.detach()), gradients, sum(storage.nbytes() for storage in kept.values())


@pytest.mark.parametrize("mode", ["off", "on"])
def test_autograd_keeps_what_the_estimate_counts(mode: Literal["off", "on"]) -> None:
    """Within 5 %: bfloat16 products, adapters on all seven linear layers."""
    setup = Setup(
        shape_of({**SHAPE, "model_type": "llama"}, "x"), backend="peft", rank=2, compute_bytes=2, device="cpu"
    )
    model = _model(mode).to(torch.bfloat16)
    for weight in model.parameters():
        if weight.requires_grad:
            weight.data = weight.data.float()
    kept = _step(model, autocast=True)[2]
    work = Workload(tokens=ROWS * LENGTH, length=LENGTH, scored=0)
    counted = estimate(setup, work, "off")
    if mode == "off":
        assert counted.activations + counted.attention == pytest.approx(kept, rel=0.05)
    else:  # the layers' inputs, and the last norm's
        hidden = ROWS * LENGTH * SHAPE["hidden_size"]
        assert kept == pytest.approx(SHAPE["num_hidden_layers"] * 2 * hidden + 4 * hidden, rel=0.05)


def test_a_full_fine_tune_keeps_what_the_estimate_counts() -> None:
    """Within 5 %: neither a sum of base and change nor a copy of a change is kept for the backward pass."""
    shape = shape_of({**SHAPE, "model_type": "llama"}, "x")
    setup = Setup(shape, method="full", backend="peft", compute_bytes=2, device="cpu")
    model = _model("off", full=True)
    counted = estimate(setup, Workload(tokens=ROWS * LENGTH, length=LENGTH, scored=0), "off")
    assert counted.activations + counted.attention == pytest.approx(_step(model, autocast=True)[2], rel=0.05)
    trained = sum(weight.numel() for weight in model.parameters() if weight.requires_grad)
    assert setup.trained_parameters == trained == shape.linear_parameters
    states = (counted.adapter, counted.gradients, counted.optimizer_states)
    assert states == (4 * trained, 4 * trained, 8 * trained)


@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize("mode", ["on", "offload"])
def test_checkpointing_changes_no_step(mode: str, full: bool) -> None:
    """The same loss and the very same gradients."""
    loss, gradients, whole = _step(_model("off", full=full), autocast=full)
    again, recomputed, kept = _step(_model(mode, full=full), autocast=full)
    assert again == loss
    assert len(gradients) == (1 if full else 2) * 7 * SHAPE["num_hidden_layers"]
    for one, other in zip(gradients, recomputed, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-7)
    assert kept < whole / 5


def test_a_targets_input_is_kept_only_where_it_is_adapted() -> None:
    """Fewer target modules, fewer inputs."""
    shape = shape_of({**SHAPE, "model_type": "llama"}, "x")
    every = kept_per_token(Setup(shape, backend="peft"))
    assert (
        every - kept_per_token(Setup(shape, backend="peft", targets=ALL_LAYERS[:-1])) == 2 * SHAPE["intermediate_size"]
    )


def test_the_estimate_knows_the_losss_chunks() -> None:
    """They are the trainers' own; the estimate has no torch to ask them."""
    assert (memory_estimate.LOSS_CHUNK, memory_estimate.LOSS_TILE) == (head_loss.CHUNK_BYTES, head_loss.TILE)
    assert memory_estimate.HELD_STATES == base_states.MOST_BYTES
