"""The loss: cross entropy on corrected answers; on replay rows cross entropy, or the distance from the base.

Logits are computed at answer positions only: with a vocabulary of 49,152 they are a fifth of a small model's work.
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import torch
from torch.nn import functional

Batch = dict[str, torch.Tensor]  # input_ids and answers (rows x tokens), replay (rows)


class Amp(NamedTuple):
    """Mixed precision: adapter weights stay float32, matrix products run in `dtype`."""

    device: str
    dtype: torch.dtype

    def __call__(self) -> torch.autocast:
        return torch.autocast(self.device, dtype=self.dtype, enabled=self.dtype != torch.float32)


def retention_loss(
    model: Any, batch: Batch, amp: Amp, replay_loss: Literal["ce", "kl"], kl_weight: float
) -> torch.Tensor:
    """Mean cross entropy over the labels' answer tokens; under "kl" + kl_weight x mean KL(base||adapter) over replay's.

    Two means, so that long replay answers do not drown short corrections. The base is the same model with its adapter
    switched off. Under "ce" replay rows are rows like any others: one mean.
    """
    rows, answers, replay = batch["input_ids"], batch["answers"], batch["replay"]
    # In an autocast of its own and first: autocast keeps casts of weights, and casts made without gradients have none.
    held = replay_loss == "kl" and bool(replay.any())
    base = _base_log_probs(model, rows[replay], answers[replay], amp) if held else None
    log_probs = _answer_log_probs(model, rows, answers, amp)
    targets = rows[:, 1:][answers[:, 1:]]
    if base is None:
        return functional.nll_loss(log_probs, targets)
    on_replay = replay[:, None].expand_as(answers[:, 1:])[answers[:, 1:]]
    held_loss = functional.kl_div(log_probs[on_replay], base, log_target=True, reduction="sum") / base.shape[0]
    if on_replay.all():
        return kl_weight * held_loss
    return functional.nll_loss(log_probs[~on_replay], targets[~on_replay]) + kl_weight * held_loss


def _base_log_probs(model: Any, rows: torch.Tensor, answers: torch.Tensor, amp: Amp) -> torch.Tensor:
    with torch.no_grad(), model.disable_adapter():
        return _answer_log_probs(model, rows, answers, amp)


def _answer_log_probs(model: Any, rows: torch.Tensor, answers: torch.Tensor, amp: Amp) -> torch.Tensor:
    """(answer tokens x vocabulary), float32. Rows are padded on the right, so that causal attention needs no mask."""
    causal = model.get_base_model()
    with amp():
        states = causal.base_model(input_ids=rows, use_cache=False).last_hidden_state
        logits = causal.get_output_embeddings()(states[:, :-1][answers[:, 1:]])
    return _as_the_model_does(logits.float(), causal.config.get_text_config()).log_softmax(-1)


def _as_the_model_does(logits: torch.Tensor, config: Any) -> torch.Tensor:
    """What some families do after the head: Cohere multiplies, Granite divides, Gemma 2 caps."""
    logits = logits * (getattr(config, "logit_scale", None) or 1.0) / (getattr(config, "logits_scaling", None) or 1.0)
    cap = getattr(config, "final_logit_softcapping", None)
    return torch.tanh(logits / cap) * cap if cap else logits


def collate(examples: list[dict[str, Any]], pad_id: int) -> Batch:
    """Padded on the right to the longest row of the batch."""
    width = max(len(example["tokens"]) for example in examples)
    rows = torch.full((len(examples), width), pad_id)
    answers = torch.zeros((len(examples), width), dtype=torch.bool)
    for number, example in enumerate(examples):
        length = len(example["tokens"])
        rows[number, :length] = torch.tensor(example["tokens"])
        answers[number, example["answer_start"] : length] = True
    return {"input_ids": rows, "answers": answers, "replay": torch.tensor([e["replay"] for e in examples])}
