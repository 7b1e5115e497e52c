"""A full fine-tune trains what the weights themselves would be trained to; its adapter is the nearest there is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import save_file
from torch.nn import functional
from transformers import LlamaConfig, LlamaForCausalLM

from loop.trainers.adapter import BrokenAdapter, write_adapter
from loop.trainers.extraction import extract, factors
from loop.trainers.full_finetuning import changed_layers, put_adapter, with_changes
from loop.trainers.spec import LoraSpec

SHAPE = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
IDS = torch.arange(24).reshape(2, 12)
LORA = LoraSpec(rank=8, alpha=16)
LAYER = "base_model.model.model.layers.0.mlp.gate_proj"


def base_model(dtype: torch.dtype = torch.float32) -> Any:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SHAPE, attention_bias=True)).to(dtype)


def loss_of(causal: Any) -> torch.Tensor:
    logits = causal(input_ids=IDS).logits.float()
    return functional.cross_entropy(logits[:, :-1].flatten(0, 1), IDS[:, 1:].flatten())


def changed(dtype: torch.dtype = torch.float32, lora: LoraSpec = LORA, size: float = 0.02) -> Any:
    """With changes of no low rank in every layer."""
    model = with_changes(base_model(dtype), lora)
    random = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for _, layer in changed_layers(model):
            layer.change.copy_(size * torch.randn(layer.change.shape, generator=random))
    return model


def test_the_changes_gradient_is_the_weights_own() -> None:
    """The same loss, and for each layer the gradient that its plain weight gets; nothing else is trained."""
    plain, model = base_model(), with_changes(base_model(), LORA)
    plain.requires_grad_(True)
    loss, expected = loss_of(model), loss_of(plain)
    assert torch.equal(loss, expected)
    loss.backward()
    expected.backward()
    layers = dict(changed_layers(model))
    assert len(layers) == 2 * 7
    for name, layer in layers.items():
        weight = plain.get_parameter(name.removeprefix("base_model.model.") + ".weight")
        torch.testing.assert_close(layer.change.grad, weight.grad, rtol=1e-4, atol=1e-8)
    trained = [weight for weight in model.parameters() if weight.requires_grad]
    assert {id(weight) for weight in trained} == {id(layer.change) for layer in layers.values()}
    assert {weight.dtype for weight in trained} == {torch.float32}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_switched_off_it_is_the_base_to_the_bit(dtype: torch.dtype) -> None:
    """Also after the changes have been trained, and trainable again afterwards: what the KL and dpo compare with."""
    model = changed(dtype)
    wanted = base_model(dtype)(input_ids=IDS).logits
    with torch.no_grad(), model.disable_adapter():
        assert torch.equal(model(input_ids=IDS).logits, wanted)
    assert not torch.equal(model(input_ids=IDS).logits, wanted)
    assert all(layer.change.requires_grad for _, layer in changed_layers(model))


def test_a_change_smaller_than_the_bases_last_digit_counts() -> None:
    """In bfloat16 the base's 1 + 0.001 is 1; the adapter that is served adds it all the same, and so does training."""
    model = with_changes(base_model(torch.bfloat16), LORA)
    layer = model.get_submodule(LAYER)
    with torch.no_grad():
        layer.base_layer.weight.fill_(1)
        layer.change[:, 0] = 0.001
        x = torch.zeros(1, SHAPE["hidden_size"], dtype=torch.bfloat16)
        x[0, 0], x[0, 1] = 1, -1  # the base's part cancels out
        torch.testing.assert_close(
            layer(x).float(), torch.full((1, SHAPE["intermediate_size"]), 0.001), rtol=0.01, atol=0
        )


def test_checkpoints_hold_the_changes_alone() -> None:
    """By peft's own means, there and back."""
    model, other = changed(), with_changes(base_model(), LORA)
    state = get_peft_model_state_dict(model)
    assert set(state) == {f"{name}.lora_change" for name, _ in changed_layers(model)}
    set_peft_model_state_dict(other, {name: weight.clone() for name, weight in state.items()})
    for (_, one), (_, two) in zip(changed_layers(model), changed_layers(other), strict=True):
        assert torch.equal(one.change, two.change)


def test_at_full_rank_the_adapter_is_the_difference(tmp_path: Path) -> None:
    """Loaded by peft onto the plain base it answers as the trained model, up to bfloat16's rounding."""
    lora = LoraSpec(rank=64, alpha=32)
    model = changed(lora=lora)
    extracted = extract(model, lora, seed=0)
    assert extracted.outcome.kept_share == pytest.approx(1, abs=1e-4)
    assert extracted.outcome.least_kept_share == pytest.approx(1, abs=1e-4)
    write_adapter(model, tmp_path / "adapter", "base", extracted.weights)
    served = PeftModel.from_pretrained(base_model(), tmp_path / "adapter")
    with torch.no_grad():
        base, wanted, found = (one(input_ids=IDS).logits for one in (base_model(), model, served))
    assert (found - wanted).norm() < 0.01 * (wanted - base).norm()


@pytest.mark.parametrize("shape", [(512, 160), (160, 512), (64, 512)])
def test_a_truncated_adapter_is_the_nearest(shape: tuple[int, int]) -> None:
    """No rank-8 matrix is nearer by more than 1 %, also where the decomposition is randomised; factors stay small."""
    change = torch.randn(shape, generator=torch.Generator().manual_seed(2)) * torch.logspace(0, -1, shape[1])
    a, b = factors(change, rank=8, scaling=2.0, seed=0)
    assert (a.shape, b.shape, a.dtype) == ((8, shape[1]), (shape[0], 8), torch.bfloat16)
    left, values, right = torch.linalg.svd(change, full_matrices=False)
    best = (change - left[:, :8] @ torch.diag(values[:8]) @ right[:8]).norm()
    assert (change - 2.0 * b.float() @ a.float()).norm() <= 1.01 * best
    assert a.float().norm() == pytest.approx(float(b.float().norm()), rel=0.01)


def test_what_is_kept_is_measured_on_what_is_written() -> None:
    """The whole's share, and the least of a layer, by its name; a layer without a change lowers neither."""
    model = changed()
    with torch.no_grad():
        model.get_submodule(LAYER).change.zero_()
    extracted = extract(model, LORA, seed=0)
    whole = missing = 0.0
    shares = {}
    for name, layer in changed_layers(model):
        product = 2.0 * extracted.weights[f"{name}.lora_B.weight"].float() @ extracted.weights[
            f"{name}.lora_A.weight"
        ].float()  # fmt: skip
        change = layer.change.detach()
        square, left = float(change.square().sum()), float((change - product).square().sum())
        whole, missing = whole + square, missing + left
        if square:
            shares[name.removeprefix("base_model.model.")] = 1 - left / square
    outcome = extracted.outcome
    assert outcome.kept_share == pytest.approx(1 - missing / whole, abs=1e-5)
    assert 0.2 < outcome.kept_share < 0.9, "noise has no low rank"
    assert outcome.least_kept_layer == min(shares, key=shares.__getitem__)
    assert outcome.least_kept_share == pytest.approx(min(shares.values()), abs=1e-5)


def test_extracting_again_gives_the_same_bytes_and_no_other_random_numbers() -> None:
    big = torch.randn(600, 700, generator=torch.Generator().manual_seed(3))
    torch.manual_seed(5)
    once = factors(big, 4, 1.0, seed=9)
    drawn = torch.rand(1)
    torch.manual_seed(6)
    again = factors(big, 4, 1.0, seed=9)
    assert all(torch.equal(one, other) for one, other in zip(once, again, strict=True))
    torch.manual_seed(5)
    assert torch.equal(torch.rand(1), drawn)


def test_going_on_from_an_adapter_begins_with_what_it_changes(tmp_path: Path) -> None:
    """Extracted again it is the same adapter: nothing is lost from night to night."""
    extracted = extract(changed(), LORA, seed=0)
    save_file(extracted.weights, tmp_path / "adapter_model.safetensors")
    model = with_changes(base_model(), LORA)
    put_adapter(model, tmp_path / "adapter_model.safetensors", LORA.alpha / LORA.rank)
    again = extract(model, LORA, seed=0)
    assert again.outcome.kept_share == pytest.approx(1, abs=1e-4)
    for name, layer in changed_layers(model):
        a, b = (extracted.weights[f"{name}.lora_{side}.weight"].float() for side in "AB")
        torch.testing.assert_close(layer.change.detach(), 2.0 * b @ a)


def test_a_change_gone_wrong_is_named() -> None:
    model = changed()
    with torch.no_grad():
        model.get_submodule(LAYER).change[0, 0] = float("nan")
    with pytest.raises(BrokenAdapter, match=r"layers\.0\.mlp\.gate_proj is not finite"):
        extract(model, LORA, seed=0)
