"""The losses of DPO, ORPO and KTO over summed log-probabilities of answers. Equal to trl's, which a test compares.

The reference is the same model with its adapter switched off: no second copy. Replay rows hold the model to that same
base by a KL term, as in `loss.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from loop.trainers.head_loss import AfterHead, answer_loss, chunks
from loop.trainers.loss import Amp
from loop.trainers.rows import Example


class Padded(NamedTuple):
    """Rows padded on the right, so that causal attention needs no mask; `answers` marks the answers' tokens."""

    input_ids: torch.Tensor  # rows x tokens
    answers: torch.Tensor  # rows x tokens, bool

    @classmethod
    def of(cls, rows: Sequence[Example], pad_id: int) -> Padded:
        width = max(len(row.tokens) for row in rows)
        ids = torch.full((len(rows), width), pad_id)
        answers = torch.zeros((len(rows), width), dtype=torch.bool)
        for number, row in enumerate(rows):
            ids[number, : len(row.tokens)] = torch.tensor(row.tokens)
            answers[number, row.answer_start : len(row.tokens)] = True
        return cls(ids, answers)

    def to(self, device: Any) -> Padded:
        return Padded(self.input_ids.to(device), self.answers.to(device))


class Scored(NamedTuple):
    """Of each row: the answer's summed log-probability (float32, nats) and its number of tokens."""

    sums: torch.Tensor
    lengths: torch.Tensor


def score(model: Any, rows: Padded, amp: Amp) -> Scored:
    states = _answer_states(model, rows, amp)
    targets = rows.input_ids[:, 1:][rows.answers[:, 1:]]
    vocabulary = model.get_base_model().config.get_text_config().vocab_size
    each = torch.cat([_chunk(model, amp, states[part], targets[part]) for part in chunks(len(states), vocabulary)])
    lengths = rows.answers[:, 1:].sum(1)
    row_of = torch.arange(len(lengths), device=lengths.device).repeat_interleave(lengths)
    return Scored(each.new_zeros(len(lengths)).index_add(0, row_of, each), lengths)


def score_base(model: Any, rows: Padded, amp: Amp) -> Scored:
    """Of the base. In a batch, to be computed before the adapter's: autocast keeps casts made without gradients."""
    with torch.no_grad(), model.disable_adapter():
        return score(model, rows, amp)


def dpo_loss(
    chosen: torch.Tensor, rejected: torch.Tensor, base: tuple[torch.Tensor, torch.Tensor], beta: float
) -> torch.Tensor:
    """arXiv:2305.18290, equation 7; the mean over pairs."""
    margin = (chosen - base[0]) - (rejected - base[1])
    return -functional.logsigmoid(beta * margin).mean()


def orpo_loss(
    chosen: Scored, rejected: Scored, beta: float, *, of_tokens: float = 1.0, of_pairs: float = 1.0
) -> torch.Tensor:
    """arXiv:2403.07691, equations 4 and 6: cross entropy of the chosen answer + beta x the odds ratio's loss.

    The cross entropy is over the answer only, as everywhere here; trl's is over the prompt's tokens too. Of a part of a
    step: its share of the step's chosen tokens, and of its pairs.
    """
    better, worse = chosen.sums / chosen.lengths, rejected.sums / rejected.lengths
    log_odds = (better - worse) - (_log1mexp(better) - _log1mexp(worse))
    return of_tokens * cross_entropy(chosen) - of_pairs * beta * functional.logsigmoid(log_odds).mean()


def cross_entropy(rows: Scored) -> torch.Tensor:
    """The mean over all answers' tokens."""
    return -rows.sums.sum() / rows.lengths.sum()


def kto_loss(
    gains: torch.Tensor, good: torch.Tensor, drift: torch.Tensor, beta: float, weights: tuple[float, float]
) -> torch.Tensor:
    """arXiv:2402.01306, equations 7 and 8. `gains`: each answer's log-probability above the base's; `drift`: the mean
    of the same over a whole step's mismatched answers, the estimate of the KL from the base, which counts as 0 where it
    is below and has no gradient."""
    kl = drift.clamp(min=0).detach()
    of_good, of_bad = 1 - torch.sigmoid(beta * (gains - kl)), 1 - torch.sigmoid(beta * (kl - gains))
    return torch.where(good, weights[0] * of_good, weights[1] * of_bad).mean()


def held_loss(model: Any, rows: Padded, amp: Amp) -> torch.Tensor:
    """Mean KL(base||adapter) over the answers' tokens: what keeps replay answers as the base gives them."""
    with torch.no_grad(), model.disable_adapter():
        base = _answer_states(model, rows, amp)
    states = _answer_states(model, rows, amp)
    with amp():
        return answer_loss(states, *_head(model), None, base) / len(states)


def _log1mexp(x: torch.Tensor) -> torch.Tensor:
    """log(1 - exp(x)) for x < 0, without losing the digits at either end (as trl: Maechler 2012)."""
    return torch.where(x < -0.6931471805599453, torch.log1p(-torch.exp(x)), torch.log(-torch.expm1(x)))


def _answer_states(model: Any, rows: Padded, amp: Amp) -> torch.Tensor:
    """(answer tokens x hidden): the states from which the answers' tokens are foretold."""
    with amp():
        states = model.get_base_model().base_model(input_ids=rows.input_ids, use_cache=False).last_hidden_state
    answer_states: torch.Tensor = states[:, :-1][rows.answers[:, 1:]]
    return answer_states


def _chunk(model: Any, amp: Amp, states: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """One chunk through the head; in the backward pass its logits are made again instead of being kept."""
    if not torch.is_grad_enabled():
        return _log_probs_of(model, amp, states, targets)
    result: torch.Tensor = checkpoint(_log_probs_of, model, amp, states, targets, use_reentrant=False)
    return result


def _log_probs_of(model: Any, amp: Amp, states: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    head, after = _head(model)
    with amp():
        logits = head(states)
    log_probs: torch.Tensor = after(logits.float()).log_softmax(-1).gather(-1, targets[:, None])[:, 0]
    return log_probs


def _head(model: Any) -> tuple[Any, AfterHead]:
    causal = model.get_base_model()
    return causal.get_output_embeddings(), AfterHead.of(causal.config.get_text_config())
