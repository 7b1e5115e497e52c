"""What one step of preferences costs, beside the same loss written out over the model's own logits, row by row."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.nn.functional import logsigmoid
from transformers import LlamaConfig, LlamaForCausalLM

from loop.trainers.loss import Amp
from loop.trainers.preference_loop import PreferenceTrainer
from loop.trainers.preference_parts import Objective, PreferenceParts, Preferences
from loop.trainers.preference_rows import Unit
from loop.trainers.rows import Example
from loop.trainers.sft_loop import arguments
from loop.trainers.spec import TrainSpec

pytestmark = pytest.mark.slow
BETA, KL_WEIGHT = 0.3, 0.7
CHOSEN = [Example("a", (1, 5, 9, 11, 13, 2), 3, False), Example("b", (1, 6, 8, 20, 2), 3, False)]
REJECTED = [Example("a/r", (1, 5, 9, 30, 31, 32, 33, 2), 3, False), Example("b/r", (1, 6, 8, 40, 41, 2), 3, False)]
PAIRS = [Unit("a", (CHOSEN[0], REJECTED[0])), Unit("b", (CHOSEN[1], REJECTED[1]))]
THUMBS = [Unit("g", (CHOSEN[0],), True), Unit("b1", (REJECTED[1],), False), Unit("b2", (REJECTED[0],), False)]
REPLAY = [Example("r0", (1, 7, 50, 51, 52, 2), 2, True), Example("r1", (1, 7, 53, 2), 2, True)]


@pytest.fixture
def model() -> Any:
    """Random, its adapter moved well away from the base."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    base = LlamaForCausalLM(LlamaConfig(vocab_size=64, initializer_range=0.3, **sizes))
    adapted = get_peft_model(base, LoraConfig(r=4, target_modules=["q_proj", "v_proj", "down_proj"]))
    with torch.no_grad():
        for name, weight in adapted.named_parameters():
            if "lora_B" in name:
                weight.normal_(std=0.1)
    return adapted.eval()


def _trainer(
    model: Any, folder: Path, objective: Objective, units: list[Unit], at_once: int | None = None, **schedule: Any
) -> PreferenceTrainer:
    spec = TrainSpec.model_validate(
        {
            "base_dir": folder,
            "base_name": "served-base",
            "base_digest": "sha256:0",
            "data_dir": folder,
            "out_dir": folder,
            "method": objective,
            "preference": {"beta": BETA},
            "schedule": {"kl_weight": KL_WEIGHT, "batch_size": 4, **schedule},
        }
    )
    plan = [(list(range(len(units))), [0, 1])]
    return PreferenceTrainer(
        spec=spec,
        plan=plan,
        parts=PreferenceParts(Preferences(objective, units, REPLAY), 0, spec.lengths.max_length, at_once),
        amp=Amp("cpu", torch.float32),
        model=model,
        args=arguments(spec, 1),
        train_dataset=plan,
    )


def _is_the_loss(trainer: PreferenceTrainer, expected: torch.Tensor) -> None:
    """In value and in gradient."""
    (batch,) = trainer.get_train_dataloader()
    weights = [weight for weight in trainer.model.parameters() if weight.requires_grad]
    loss = torch.stack([loss for loss, _ in trainer.losses(trainer.model.eval(), batch["step"])]).sum()
    assert loss.item() == pytest.approx(expected.item(), abs=1e-5)
    ours, theirs = torch.autograd.grad(loss, weights), torch.autograd.grad(expected, weights)
    for one, other in zip(ours, theirs, strict=True):
        assert torch.allclose(one, other, atol=1e-5)
    assert max(one.abs().max() for one in ours) > 1e-3


def _logits(model: Any, row: Example, *, base: bool = False) -> torch.Tensor:
    """Log-probabilities that foretell the answer's tokens: answer tokens x vocabulary."""
    ids = torch.tensor([row.tokens])
    if base:
        with torch.no_grad(), model.disable_adapter():
            logits = model(input_ids=ids).logits[0]
    else:
        logits = model(input_ids=ids).logits[0]
    foretold: torch.Tensor = logits.log_softmax(-1)[row.answer_start - 1 : -1]
    return foretold


def _sum(model: Any, row: Example, *, base: bool = False) -> torch.Tensor:
    answer = torch.tensor(row.tokens[row.answer_start :])
    return _logits(model, row, base=base).gather(-1, answer[:, None]).sum()


def _gain(model: Any, row: Example) -> torch.Tensor:
    return _sum(model, row) - _sum(model, row, base=True)


def _held(model: Any) -> torch.Tensor:
    """KL(base||adapter), the mean over the tokens of all replay answers."""
    of_tokens = []
    for row in REPLAY:
        base, own = _logits(model, row, base=True), _logits(model, row)
        of_tokens.append((base.exp() * (base - own)).sum(-1))
    return torch.cat(of_tokens).mean()


def test_a_step_of_pairs_is_dpos_loss_and_the_hold(model: Any, tmp_path: Path) -> None:
    """Each answer above the base, chosen above rejected, x beta; replay at its weight; margins are without it."""
    trainer = _trainer(model, tmp_path, "dpo", PAIRS)
    above = torch.stack([_gain(model, unit.rows[0]) - _gain(model, unit.rows[1]) for unit in PAIRS])
    expected = -logsigmoid(BETA * above).mean() + KL_WEIGHT * _held(model)
    _is_the_loss(trainer, expected)
    margin = torch.stack([_sum(model, unit.rows[0]) - _sum(model, unit.rows[1]) for unit in PAIRS]).mean()
    (batch,) = trainer.get_train_dataloader()
    trainer.training_step(trainer.model.eval(), batch)
    assert trainer.margins == [pytest.approx(margin.item(), abs=1e-4)]


def test_a_step_of_pairs_is_orpos_loss_and_the_hold(model: Any, tmp_path: Path) -> None:
    """Mean log-probability a token makes the odds; no base in it but the replay's; cross entropy of the chosen ones."""
    trainer = _trainer(model, tmp_path, "orpo", PAIRS)

    def log_odds(row: Example) -> torch.Tensor:
        mean = _sum(model, row) / (len(row.tokens) - row.answer_start)
        return mean - torch.log(1 - mean.exp())

    ratio = torch.stack([log_odds(unit.rows[0]) - log_odds(unit.rows[1]) for unit in PAIRS])
    tokens = sum(len(row.tokens) - row.answer_start for row in CHOSEN)
    entropy = -torch.stack([_sum(model, row) for row in CHOSEN]).sum() / tokens
    expected = entropy - BETA * logsigmoid(ratio).mean() + KL_WEIGHT * _held(model)
    _is_the_loss(trainer, expected)


def test_a_step_of_thumbs_is_ktos_loss_and_the_hold(model: Any, tmp_path: Path) -> None:
    """One good, two bad: the good one counts twice. The drift is of prompts with their neighbours' answers."""
    trainer = _trainer(model, tmp_path, "kto", THUMBS)
    rows = [unit.rows[0] for unit in THUMBS]
    drifts = []
    for row, other in zip(rows, [rows[-1], *rows[:-1]], strict=True):
        tokens = (*row.tokens[: row.answer_start], *other.tokens[other.answer_start :])
        drifts.append(_gain(model, Example("m", tokens, row.answer_start, False)))
    drift = torch.stack(drifts).mean().detach()
    assert drift > 0.1, "else held at zero, and this test would not see it"
    signs, weights = torch.tensor([1.0, -1.0, -1.0]), torch.tensor([2.0, 1.0, 1.0])
    gains = torch.stack([_gain(model, row) for row in rows])
    expected = (weights * (1 - torch.sigmoid(signs * BETA * (gains - drift)))).mean() + KL_WEIGHT * _held(model)
    _is_the_loss(trainer, expected)


def test_replay_by_cross_entropy_has_no_base_in_it(model: Any, tmp_path: Path) -> None:
    """The mean over the tokens of all replay answers, at weight 1."""
    trainer = _trainer(model, tmp_path, "dpo", PAIRS, replay_loss="ce")
    above = torch.stack([_gain(model, unit.rows[0]) - _gain(model, unit.rows[1]) for unit in PAIRS])
    tokens = sum(len(row.tokens) - row.answer_start for row in REPLAY)
    entropy = -torch.stack([_sum(model, row) for row in REPLAY]).sum() / tokens
    _is_the_loss(trainer, -logsigmoid(BETA * above).mean() + entropy)


@pytest.mark.parametrize("objective", ["dpo", "orpo", "kto"])
@pytest.mark.parametrize("replay_loss", ["kl", "ce"])
def test_parts_add_up_to_the_step(objective: Objective, replay_loss: str, model: Any, tmp_path: Path) -> None:
    """One pair or row at a time: the same loss, gradients and margin; the drift is the whole step's in every part."""
    units = THUMBS if objective == "kto" else PAIRS
    found = []
    for at_once, parts in ((None, 2), (1, len(units) + len(REPLAY))):
        trainer = _trainer(model, tmp_path, objective, units, at_once, replay_loss=replay_loss)
        (batch,) = trainer.get_train_dataloader()
        assert len(batch["step"].parts) == parts
        weights = [weight for weight in trainer.model.parameters() if weight.requires_grad]
        loss = trainer.training_step(trainer.model.eval(), batch)
        found.append((loss, [weight.grad.clone() for weight in weights], trainer.margins))
        trainer.model.zero_grad()
    (whole, gradients, margins), (parted, others, told) = found
    assert parted.item() == pytest.approx(whole.item(), abs=1e-5)
    assert told == pytest.approx(margins, abs=1e-4)
    assert len(told) == (0 if objective == "kto" else 1)
    assert max(one.abs().max() for one in gradients) > 1e-3
    for one, other in zip(gradients, others, strict=True):
        assert torch.allclose(one, other, atol=1e-5)


def test_a_try_leaves_nothing_behind(model: Any, tmp_path: Path) -> None:
    """Neither gradients nor margins; the step after it is the one that it would have been."""
    trainer = _trainer(model, tmp_path, "dpo", PAIRS)
    weights = [weight for weight in trainer.model.parameters() if weight.requires_grad]
    for tried in (trainer.try_shortest, trainer.try_heaviest):
        tried()
        assert all(weight.grad is None or not weight.grad.any() for weight in weights)
    assert trainer.margins == []
    trainer.train_at_once(1)
    (batch,) = trainer.get_train_dataloader()
    assert len(batch["step"].parts) == len(PAIRS) + len(REPLAY)
