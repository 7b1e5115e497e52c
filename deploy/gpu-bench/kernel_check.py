"""Kernels against torch's plain way: attention over packed rows (output and gradients, grouped heads of the 8B shape),
and the loss of a chunk of logits."""

from __future__ import annotations

import json
import sys
from itertools import pairwise
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
from torch.nn import functional

from loop.trainers.head_loss import AfterHead, answer_loss
from loop.trainers.varlen_attention import attend

STARTS = [0, 61, 200, 201, 600, 1024]


def main() -> int:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    shapes = ((1, 32, STARTS[-1], 128), (1, 8, STARTS[-1], 128), (1, 8, STARTS[-1], 128))
    given = [torch.randn(shape, device=device, dtype=torch.bfloat16, requires_grad=True) for shape in shapes]
    wanted = _one_by_one(*(states.float() for states in given))
    starts = torch.tensor(STARTS, dtype=torch.int32, device=device)
    longest = max(end - start for start, end in pairwise(STARTS))
    found, _ = attend(torch.nn.Module(), *given, None, cu_seq_lens_q=starts, max_length_q=longest)
    slope = torch.randn_like(wanted)
    gradients = torch.autograd.grad((wanted * slope).sum(), given), torch.autograd.grad((found * slope).sum(), given)
    pairs = [("output", wanted, found), *zip(("query", "key", "value"), *gradients, strict=True)]
    far = {
        name: round(float((one.float() - two.float()).detach().norm() / one.float().detach().norm()), 5)
        for name, one, two in pairs
    }
    far |= _head(device)
    sys.stdout.write(json.dumps(far | {"device": device, "bar": 0.02, "reached": max(far.values()) < 0.02}) + "\n")
    return 0 if max(far.values()) < 0.02 else 1


def _head(device: str) -> dict[str, float]:
    """The frozen head's loss and slope against autograd in float32; more words than a block, and not a multiple."""
    head = torch.nn.Linear(256, 12_345, bias=False, device=device, dtype=torch.bfloat16).requires_grad_(False)
    states = torch.randn(700, 256, device=device, dtype=torch.bfloat16, requires_grad=True)
    targets = torch.randint(12_345, (700,), device=device)
    with torch.no_grad():
        head.weight[targets[:350]] += states[:350] / 12  # half of the targets are foretold
    wanted = functional.cross_entropy(states.float() @ head.weight.float().t(), targets, reduction="sum")
    found = answer_loss(states, head, AfterHead(), targets, None)
    slopes = [torch.autograd.grad(loss, states)[0].float() for loss in (wanted, found)]
    return {
        "loss": round(abs(float((wanted - found).detach() / wanted.detach())), 5),
        "loss's slope": round(float((slopes[0] - slopes[1]).norm() / slopes[0].norm()), 5),
    }


def _one_by_one(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    rows = [
        functional.scaled_dot_product_attention(*(x[:, :, start:end] for x in (query, key, value)), is_causal=True)
        for start, end in pairwise(STARTS)
    ]
    return torch.cat(rows, 2).transpose(1, 2)


if __name__ == "__main__":
    sys.exit(main())
