"""Checkpointing that was asked for is in effect, whatever a backend's switches do; else the run stops with the cure."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from loop.trainers.checkpointing import SWITCHED, CheckpointingNotInEffect, ensure, ready, recompute

SHAPE = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
}


def _model(mode: str = "off") -> Any:
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**SHAPE))
    recompute(model, mode)
    return get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM"))


def _step(model: Any) -> None:
    states = model.get_base_model().base_model(input_ids=torch.tensor([[1, 2, 3]]), use_cache=False).last_hidden_state
    states.pow(2).mean().backward()


def _switch_off(model: Any) -> None:
    """As Unsloth's trainer leaves a model that it was made with."""
    for module in model.modules():
        module.training = False
        if hasattr(module, "gradient_checkpointing"):
            module.gradient_checkpointing = False


def _for_training(model: Any, use_gradient_checkpointing: Any = None) -> None:
    """As Unsloth's: the recorded mode comes back, and with it the layers' flags."""
    for module in model.modules():
        module.training = True
        if hasattr(module, "gradient_checkpointing"):
            module.gradient_checkpointing = bool(use_gradient_checkpointing)


@pytest.mark.parametrize("mode", ["on", "offload"])
def test_what_is_in_effect_is_left_alone(mode: str) -> None:
    """No word, no change, and no hook left behind."""
    model = _model(mode)
    ready(model)
    given = [layer._gradient_checkpointing_func for layer in model.get_base_model().model.layers]
    assert ensure(model, mode, partial(_step, model)) == ""
    assert [layer._gradient_checkpointing_func for layer in model.get_base_model().model.layers] == given
    assert not any(module._forward_pre_hooks for module in model.get_base_model().model.layers)


def test_a_backends_own_switch_is_used() -> None:
    """Before the heaviest batch is tried, not only when its trainer begins to train."""
    model = _model("on")
    model.for_training = partial(_for_training, model)
    model._unsloth_gradient_checkpointing = "unsloth"
    _switch_off(model)
    ready(model)
    assert all(module.training for module in model.modules())
    assert ensure(model, "on", partial(_step, model)) == ""


@pytest.mark.parametrize("mode", ["on", "offload"])
def test_where_it_is_not_in_effect_the_trainers_own_takes_over(mode: str) -> None:
    """A backend that promised it and doesn't do it: told, and from then on layers are recomputed."""
    model = _model("off")
    ready(model)
    _step(model)
    wanted = [weight.grad.clone() for weight in model.parameters() if weight.grad is not None]
    assert ensure(model, mode, partial(_step, model)) == SWITCHED
    model.zero_grad()
    assert ensure(model, mode, partial(_step, model)) == ""
    got = [weight.grad for weight in model.parameters() if weight.grad is not None]
    for one, other in zip(got, wanted, strict=True):
        torch.testing.assert_close(one, other)


def test_layers_that_never_recompute_stop_the_run() -> None:
    """A family that calls its layers past their own way in: the cure instead of no memory left, hours later."""
    model = _model("on")
    ready(model)
    layer = model.get_base_model().model.layers[1]
    layer.__class__ = type("Past", (type(layer),), {"__call__": torch.nn.Module.__call__})
    with pytest.raises(CheckpointingNotInEffect, match="33% of the layers keep") as caught:
        ensure(model, "on", partial(_step, model))
    assert "trainer.backend" in caught.value.hint


def test_nothing_is_tried_where_nothing_was_asked() -> None:
    """Without checkpointing, not even the short row is trained."""

    def never() -> None:
        raise AssertionError

    assert ensure(_model(), "off", never) == ""
