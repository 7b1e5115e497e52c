"""An adapter out of a full fine-tune: each layer's change, as near as the adapter's rank allows.

The nearest matrix of a rank, by the Frobenius norm, is the truncated singular value decomposition (Eckart and Young,
1936); tools that extract an adapter from a fine-tuned model (mergekit's, LoRD) do the same. Large matrices are
decomposed by a randomised method (Halko, Martinsson and Tropp, arXiv:0909.4061). What is lost is measured on the
adapter as it is written, in bfloat16.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import torch

from loop.trainers.adapter import BrokenAdapter
from loop.trainers.full_finetuning import changed_layers
from loop.trainers.spec import Extraction, LoraSpec

OVERSAMPLING, ITERATIONS = 16, 4  # of the randomised method: within 1 % of the best in a test
EXACT_FROM = 0.5  # of all singular values asked for: the plain method is as fast


class Extracted(NamedTuple):
    """`weights` by peft's names, bfloat16."""

    weights: dict[str, torch.Tensor]
    outcome: Extraction


def extract(model: Any, lora: LoraSpec, seed: int) -> Extracted:
    """Of a model trained with changes. `seed`: of the randomised method, so that equal changes give equal bytes."""
    weights: dict[str, torch.Tensor] = {}
    shares: dict[str, tuple[float, float]] = {}
    for name, layer in changed_layers(model):
        change = layer.change.detach()
        if not torch.isfinite(change).all():
            raise BrokenAdapter(f"what was trained of {name} is not finite")
        a, b = factors(change, lora.rank, lora.alpha / lora.rank, seed)
        weights |= {f"{name}.lora_A.weight": a, f"{name}.lora_B.weight": b}
        shares[name] = _squares(change, lora.alpha / lora.rank * (b.float() @ a.float()))
    return Extracted(weights, _outcome(shares))


def factors(change: torch.Tensor, rank: int, scaling: float, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(rank x inputs), (outputs x rank) in bfloat16, whose product times `scaling` is nearest to `change`.

    Both get the root of each singular value, so that neither grows large. A rank beyond the matrix's is filled with 0.
    """
    left, values, right = _decomposed(change, min(rank, *change.shape), seed)
    root = (values / scaling).sqrt()
    a = change.new_zeros(rank, change.shape[1])
    b = change.new_zeros(change.shape[0], rank)
    a[: len(root)], b[:, : len(root)] = root[:, None] * right.t(), left * root
    return a.to(torch.bfloat16), b.to(torch.bfloat16)


def _decomposed(change: torch.Tensor, rank: int, seed: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The `rank` largest singular values, with the vectors to their left and right as columns."""
    most = min(change.shape)
    if rank + OVERSAMPLING >= EXACT_FROM * most:
        left, values, right = torch.linalg.svd(change, full_matrices=False)
        return left[:, :rank], values[:rank], right[:rank].t()
    devices = [change.device] if change.is_cuda else []
    with torch.random.fork_rng(devices):
        torch.manual_seed(seed)
        left, values, right = torch.svd_lowrank(change, rank + OVERSAMPLING, niter=ITERATIONS)
    return left[:, :rank], values[:rank], right[:, :rank]


def _squares(change: torch.Tensor, kept: torch.Tensor) -> tuple[float, float]:
    """The squared norm of the change, and of what is missing of it."""
    return float(change.square().sum()), float((change - kept).square().sum())


def _outcome(shares: dict[str, tuple[float, float]]) -> Extraction:
    least = min(shares, key=lambda name: _share([shares[name]]))
    return Extraction(
        kept_share=_share(shares.values()),
        least_kept_share=_share([shares[least]]),
        least_kept_layer=least.removeprefix("base_model.model."),
    )


def _share(squares: Iterable[tuple[float, float]]) -> float:
    """Of the squared norm, 0..1; all of a change that is none."""
    whole, missing = (sum(part) for part in zip(*squares, strict=True))
    return round(max(0.0, 1 - missing / whole), 6) if whole else 1.0
