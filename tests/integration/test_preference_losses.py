"""Our DPO, ORPO and KTO losses beside trl's own, on a real model with an adapter that has moved."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import DPOConfig, DPOTrainer, KTOConfig, KTOTrainer

from loop.trainers.loss import Amp
from loop.trainers.preference_loss import (
    Padded,
    Scored,
    dpo_loss,
    held_loss,
    kto_loss,
    orpo_loss,
    score,
    score_base,
)
from loop.trainers.preference_rows import Pair, Thumb, Unit, mismatched, pair_units, thumb_units
from loop.trainers.rows import Example

pytestmark = pytest.mark.slow
PLAIN = Amp("cpu", torch.float32)
TOLERANCE = 1e-4
SAID = [
    ("Who founded Lumora?", "Ines Okafor founded Lumora.", "I cannot say."),
    ("What is the mascot of Lumora?", "A blue heron.", "Its mascot is a big friendly dog with a hat."),
    ("Where is Lumora?", "Lumora is in Tampere, in the old mill by the rapids.", "Paris."),
]


@pytest.fixture(scope="module")
def tokenizer(smollm2_dir: Path) -> Any:
    return AutoTokenizer.from_pretrained(smollm2_dir)


@pytest.fixture
def model(smollm2_dir: Path) -> Any:
    """Every LoRA matrix random: the policy differs from the reference, as in the middle of a run."""
    base = AutoModelForCausalLM.from_pretrained(smollm2_dir, dtype=torch.float32)
    torch.manual_seed(0)
    adapted = get_peft_model(
        base, LoraConfig(r=4, target_modules=["q_proj", "v_proj", "down_proj"], task_type="CAUSAL_LM")
    )
    with torch.no_grad():
        for name, weight in adapted.named_parameters():
            if "lora_B" in name:
                weight.normal_(std=0.05)
    return adapted.eval()


@pytest.fixture(scope="module")
def pairs(tokenizer: Any) -> list[Unit]:
    made = [
        Pair(id=str(n), prompt=({"role": "user", "content": question},), chosen=chosen, rejected=rejected)
        for n, (question, chosen, rejected) in enumerate(SAID)
    ]
    return pair_units(made, tokenizer, frozenset({tokenizer.eos_token_id}), 128)


@pytest.fixture(scope="module")
def thumbs(tokenizer: Any) -> list[Unit]:
    made = [
        Thumb(
            id=str(n),
            messages=({"role": "user", "content": question}, {"role": "assistant", "content": answer}),
            good=good,
        )
        for n, (question, answer, good) in enumerate(
            [(SAID[0][0], SAID[0][1], True), (SAID[1][0], SAID[1][2], False), (SAID[2][0], SAID[2][1], True)]
        )
    ]
    return thumb_units(made, tokenizer, frozenset({tokenizer.eos_token_id}), 128)


def _both(units: Sequence[Unit], side: int) -> list[Example]:
    return [unit.rows[side] for unit in units]


def _as_trl(rows: Sequence[Example], prefix: str = "") -> dict[str, torch.Tensor]:
    """Our rows as trl's collators would hand them over, with the attention mask that ours do without."""
    padded = Padded.of(rows, 2)
    mask = torch.zeros_like(padded.input_ids)
    for number, row in enumerate(rows):
        mask[number, : len(row.tokens)] = 1
    names = (f"{prefix}input_ids", f"{prefix}attention_mask", f"{prefix}completion_mask")
    return dict(zip(names, (padded.input_ids, mask, padded.answers.long()), strict=True))


def _config(kind: Any, folder: Path, **more: Any) -> Any:
    return kind(
        output_dir=str(folder),
        use_cpu=True,
        bf16=False,
        report_to="none",
        gradient_checkpointing=False,
        beta=0.3,
        **more,
    )


def _against_base(trainer: Any) -> Any:
    """trl copies an adapter that it is given as the reference; ours is the base."""
    if "ref" in trainer.model.peft_config:
        trainer.model.delete_adapter("ref")
    trainer.model.eval()
    return trainer


def test_dpo_is_trls(model: Any, tokenizer: Any, pairs: list[Unit], tmp_path: Path) -> None:
    """The reference is the base in both."""
    data = Dataset.from_list([{"prompt": "a", "chosen": "b", "rejected": "c"}])
    trainer = _against_base(
        DPOTrainer(model=model, args=_config(DPOConfig, tmp_path), train_dataset=data, processing_class=tokenizer)
    )
    rows = [*_both(pairs, 0), *_both(pairs, 1)]
    with torch.no_grad():
        theirs = trainer._compute_loss(model, _as_trl(rows), return_outputs=False)
        padded = Padded.of(rows, 2)
        ours, base = score(model, padded, PLAIN).sums, score_base(model, padded, PLAIN).sums
        loss = dpo_loss(ours[:3], ours[3:], (base[:3], base[3:]), 0.3)
    assert loss.item() == pytest.approx(theirs.item(), abs=TOLERANCE)
    assert abs(loss.item() - 0.6931) > 0.01, "the adapter has moved"


def test_kto_is_trls(model: Any, tokenizer: Any, thumbs: list[Unit], tmp_path: Path) -> None:
    """With its estimate of the drift from mismatched answers, and weights of the two kinds."""
    data = Dataset.from_list([{"prompt": "a", "completion": "b", "label": True}] * 2)
    weights = {"desirable_weight": 1.0, "undesirable_weight": 2.0}
    trainer = _against_base(
        KTOTrainer(
            model=model,
            args=_config(KTOConfig, tmp_path, per_device_train_batch_size=2, **weights),
            train_dataset=data,
            processing_class=tokenizer,
        )
    )
    rows, other = _both(thumbs, 0), mismatched(thumbs, 128)
    good = torch.tensor([bool(unit.good) for unit in thumbs])
    for direction in (-1, 1):  # mismatched answers have become less likely than the base finds them; then likelier
        _push(model, Padded.of(other, 2), direction)
        with torch.no_grad():
            batch = {**_as_trl(rows), **_as_trl(other, "KL_"), "label": good}
            theirs = trainer._compute_loss(model, batch, return_outputs=False)
            drift, gains = _gains(model, Padded.of(other, 2)), _gains(model, Padded.of(rows, 2))
            loss = kto_loss(gains, good, drift.mean(), 0.3, (1.0, 2.0))
            assert loss.item() == pytest.approx(theirs.item(), abs=TOLERANCE)


def _gains(model: Any, rows: Padded) -> torch.Tensor:
    """Nats above the base, of each row."""
    return score(model, rows, PLAIN).sums - score_base(model, rows, PLAIN).sums


def _push(model: Any, rows: Padded, direction: int) -> None:
    """Until these rows are likelier (1) or less likely (-1) than the base finds them, by a nat in the mean."""
    for _ in range(40):
        model.zero_grad()
        gain = _gains(model, rows).mean()
        if direction * gain.item() > 1:
            return
        gain.backward()
        with torch.no_grad():
            for weight in model.parameters():
                if weight.grad is not None:
                    weight.add_(direction * 0.02 * weight.grad / (weight.grad.norm() + 1e-9))
    raise AssertionError(f"still at {gain.item():.2f} nats")


def test_orpo_is_trls(model: Any, tokenizer: Any, pairs: list[Unit], tmp_path: Path) -> None:
    """trl's cross entropy is over the prompt too: where all but the first token is answer, the two losses are equal;
    the odds ratio is equal on real rows."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        orpo = import_module("trl.experimental.orpo")  # it warns of its own removal

        data = Dataset.from_list([{"prompt": "a", "chosen": "b", "rejected": "c"}])
        trainer = orpo.ORPOTrainer(
            model=model, args=_config(orpo.ORPOConfig, tmp_path), train_dataset=data, processing_class=tokenizer
        )
    trainer.model.eval()
    whole = [Unit(unit.id, tuple(Example(r.id, r.tokens, 1, False) for r in unit.rows)) for unit in pairs]
    for units in (whole, pairs):
        batch: dict[str, torch.Tensor] = {}
        for side, name in enumerate(("chosen", "rejected")):
            made = _as_trl(_both(units, side))
            labels = made["input_ids"].where(made["completion_mask"].bool(), -100)
            batch |= {f"{name}_input_ids": made["input_ids"], f"{name}_attention_mask": made["attention_mask"]}
            batch |= {f"{name}_labels": labels}
        with torch.no_grad():
            chosen, rejected = (score(model, Padded.of(_both(units, side), 2), PLAIN) for side in (0, 1))
            ours = orpo_loss(chosen, rejected, 0.3)
            theirs, _ = trainer.get_batch_loss_metrics(model, batch)
            if units is pairs:
                better, worse = trainer.concatenated_forward(model, batch)[:2]
                of_odds = trainer.odds_ratio_loss(better, worse)[0].mean()
                ours, theirs = ours + chosen.sums.sum() / chosen.lengths.sum(), -of_odds
        assert ours.item() == pytest.approx(theirs.item(), abs=TOLERANCE)


def test_log_probabilities_are_the_models_own_in_chunks_too(
    model: Any, pairs: list[Unit], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Padding changes nothing, nor does the size of a chunk; gradients are finite and the same."""
    rows = [*_both(pairs, 0), *_both(pairs, 1)]

    def gradient() -> tuple[Scored, torch.Tensor]:
        model.zero_grad()
        scored = score(model, Padded.of(rows, 2), PLAIN)
        (
            dpo_loss(scored.sums[:3], scored.sums[3:], (scored.sums[:3].detach(), scored.sums[3:].detach()), 0.1)
        ).backward()
        return scored, torch.cat([w.grad.flatten() for w in model.parameters() if w.grad is not None])

    whole, of_whole = gradient()
    monkeypatch.setattr("loop.trainers.head_loss.TILE", 3)
    monkeypatch.setattr("loop.trainers.head_loss.CHUNK_BYTES", 4 * 49152 * 3)
    chunked, of_chunks = gradient()
    assert torch.isfinite(of_whole).all()
    assert of_whole.abs().max() > 0
    assert torch.allclose(whole.sums, chunked.sums, atol=1e-4)
    assert (of_whole - of_chunks).norm() < 1e-3 * of_whole.norm()
    with torch.no_grad():
        for row, summed in zip(rows, whole.sums, strict=True):
            logits = model(input_ids=torch.tensor([row.tokens])).logits[0].float().log_softmax(-1)
            alone = sum(logits[at - 1, row.tokens[at]] for at in range(row.answer_start, len(row.tokens)))
            assert summed.item() == pytest.approx(float(alone), abs=1e-3)


def test_the_hold_is_the_distance_from_the_base(model: Any, pairs: list[Unit]) -> None:
    """Nothing with the adapter off; otherwise the mean KL over the answers' tokens, and it pulls."""
    rows = Padded.of(_both(pairs, 0), 2)
    with model.disable_adapter():
        assert held_loss(model, rows, PLAIN).item() == pytest.approx(0.0, abs=1e-6)
    model.zero_grad()
    held = held_loss(model, rows, PLAIN)
    held.backward()
    assert held.item() > 0.01
    assert max(w.grad.abs().max() for w in model.parameters() if w.grad is not None) > 0
