"""The loss: cross entropy on corrected answers; on replay rows cross entropy, or the distance from the base.

Logits are computed at answer positions only, and in chunks (`head_loss.py`).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from loop.trainers.batches import Part
from loop.trainers.head_loss import AfterHead, answer_loss


class Amp(NamedTuple):
    """Mixed precision: adapter weights stay float32, matrix products run in `dtype`."""

    device: str
    dtype: torch.dtype

    def __call__(self) -> torch.autocast:
        return torch.autocast(self.device, dtype=self.dtype, enabled=self.dtype != torch.float32)


def retention_loss(
    model: Any, part: Part, amp: Amp, base_states: torch.Tensor | None, kl_weight: float
) -> torch.Tensor:
    """A part's share of: mean cross entropy over the answers' tokens + kl_weight x mean KL(base||adapter) over those
    of rows that are held.

    Two means, so that long replay answers do not drown short corrections. Both divide by the whole step's tokens: the
    parts of a step add up to its loss. `base_states`: the base's hidden states for the held rows, in their order.
    """
    states = answer_states(model, part, amp)
    causal = model.get_base_model()
    head, after = causal.get_output_embeddings(), AfterHead.of(causal.config.get_text_config())
    trained = len(part.targets)
    loss = states.new_zeros((), dtype=torch.float32)
    with amp():
        if trained:
            loss = answer_loss(states[:trained], head, after, part.targets, None) / part.total_targets
        if part.held_rows:
            held = answer_loss(states[trained:], head, after, None, base_states)
            loss = loss + kl_weight * held / part.total_held
    return loss


def answer_states(model: Any, part: Part, amp: Amp) -> torch.Tensor:
    """(answer tokens x hidden): the last hidden states from which the answers' tokens are foretold."""
    with amp():
        states = (
            model.get_base_model()
            .base_model(input_ids=part.input_ids, use_cache=False, **boundaries(part))
            .last_hidden_state
        )
    return states.flatten(0, 1).index_select(0, part.at)


def boundaries(part: Part) -> dict[str, Any]:
    """Where packed rows begin, as transformers' attention functions and as Unsloth's are told."""
    if part.starts is None:
        return {}
    return {
        "position_ids": part.positions,
        "cu_seq_lens_q": part.starts,
        "cu_seq_lens_k": part.starts,
        "max_length_q": part.longest,
        "max_length_k": part.longest,
        "packed_seq_lengths": part.starts.diff(),
    }
