"""The language-model head and its loss in chunks: memory grows with tokens, never with tokens x vocabulary.

A chunk's logits are made, turned into the loss and at once into the gradient of the hidden states, and forgotten: those
of 8,192 tokens over 128,256 words would be 4.2 GB in float32, several times over.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

try:
    from loop.trainers.head_kernel import cross_entropy_
except ModuleNotFoundError:  # no triton where there is no GPU
    cross_entropy_ = None  # type: ignore[assignment]

CHUNK_BYTES = 256 * 2**20  # of one chunk's logits in float32; about four times as much is alive at once
IN_PLACE = 4  # times as many rows a chunk where logits themselves become the slope, and nothing else is made of them
TILE = 128  # rows: a matrix product of a few rows more costs as much as of a whole tile


@dataclass(frozen=True)
class AfterHead:
    """What some families do to their logits: Cohere multiplies, Granite divides, Gemma 2 caps."""

    scale: float = 1.0
    cap: float = 0.0

    @classmethod
    def of(cls, config: Any) -> AfterHead:
        scale = (getattr(config, "logit_scale", None) or 1.0) / (getattr(config, "logits_scaling", None) or 1.0)
        return cls(scale, getattr(config, "final_logit_softcapping", None) or 0.0)

    def __call__(self, logits: torch.Tensor) -> torch.Tensor:
        if self.scale != 1.0:
            logits = logits.float() * self.scale
        return self.cap * torch.tanh(logits.float() / self.cap) if self.cap else logits

    def back_(self, gradient: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        """The gradient of what goes in; in place. `logits` are what came out."""
        if self.cap:
            gradient *= 1 - (logits / self.cap) ** 2
        return gradient.mul_(self.scale) if self.scale != 1.0 else gradient


PLAIN = AfterHead()


def answer_loss(
    states: torch.Tensor, head: nn.Module, after: AfterHead, targets: torch.Tensor | None, base: torch.Tensor | None
) -> torch.Tensor:
    """Summed over tokens, float32: cross entropy with `targets` (tokens), or KL(base||states) with the base's hidden
    states (tokens x hidden). `states` are (tokens x hidden).

    A frozen plain head, which is the rule, gets its gradient while the loss is made. One with an adapter of its own or
    quantised is called as it is, each chunk again in the backward pass.
    """
    if type(head) is nn.Linear and not any(weight.requires_grad for weight in head.parameters()):
        total: torch.Tensor = _FrozenHead.apply(states, head.weight, head.bias, after, targets, base)
        return total
    total = states.new_zeros((), dtype=torch.float32)
    for rows in chunks(len(states), _vocabulary(head)):
        parts = [None if given is None else given[rows] for given in (targets, base)]
        total = total + checkpoint(_plainly, states[rows], head, after, *parts, use_reentrant=False)
    return total


def chunks(tokens: int, vocabulary: int, times: int = 1) -> Iterator[slice]:
    rows = max(times * CHUNK_BYTES // (4 * vocabulary) // TILE, 1) * TILE
    return (slice(start, start + rows) for start in range(0, tokens, rows))


def _vocabulary(head: Any) -> int:
    size: int = head.out_features if hasattr(head, "out_features") else head.weight.shape[0]
    return size


def _plainly(
    states: torch.Tensor, head: nn.Module, after: AfterHead, targets: torch.Tensor | None, base: torch.Tensor | None
) -> torch.Tensor:
    log_probs = _log_probs(after(head(states)))
    if targets is not None:
        return functional.nll_loss(log_probs, targets, reduction="sum")
    with torch.no_grad():
        held = _log_probs(after(head(base)))
    return functional.kl_div(log_probs, held, log_target=True, reduction="sum")


def _log_probs(logits: torch.Tensor) -> torch.Tensor:
    """Half precision is widened inside the kernel, not before it."""
    return logits.log_softmax(-1, dtype=torch.float32)


class _FrozenHead(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        states: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        after: AfterHead,
        targets: torch.Tensor | None,
        base: torch.Tensor | None,
    ) -> torch.Tensor:
        total = states.new_zeros((), dtype=torch.float32)
        gradient = torch.empty_like(states) if ctx.needs_input_grad[0] else None
        in_place = targets is not None and after == PLAIN and weight.is_cuda and cross_entropy_ is not None
        for rows in chunks(len(states), weight.shape[0], IN_PLACE if in_place else 1):
            logits = after(functional.linear(states[rows].to(weight.dtype), weight, bias))
            if in_place:
                assert targets is not None
                total += cross_entropy_(logits, targets[rows]).sum()
                if gradient is not None:
                    gradient[rows] = logits @ weight  # the slope by now
                continue
            log_probs = _log_probs(logits)
            if targets is not None:
                at = torch.arange(len(logits), device=logits.device), targets[rows]
                total -= log_probs[at].sum()
                slope = log_probs.exp_()  # of the cross entropy: probability, less 1 at the target
                slope[at] -= 1
            else:
                assert base is not None
                held = _log_probs(after(functional.linear(base[rows].to(weight.dtype), weight, bias)))
                total += functional.kl_div(log_probs, held, log_target=True, reduction="sum")
                slope = log_probs.exp_().sub_(held.exp_())
            if gradient is not None:
                gradient[rows] = after.back_(slope, logits).to(weight.dtype) @ weight
        ctx.save_for_backward(gradient)
        return total

    @staticmethod
    def backward(ctx: Any, *upstream: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (gradient,) = ctx.saved_tensors
        return gradient * upstream[0].to(gradient.dtype), None, None, None, None, None
