"""Cross entropy of one chunk of logits and its slope in one kernel: logits are read twice and written once.

In torch's own pieces (log-softmax in float32, exp, subtract, round) the same takes four times the memory traffic.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

BLOCK = 4096
WARPS = 8


def cross_entropy_(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """(tokens,) float32 losses. `logits` (tokens x words, rows contiguous) become the slope of the sum: softmax, less 1
    at the target, computed in float32 and rounded once."""
    losses = torch.empty(len(logits), dtype=torch.float32, device=logits.device)
    _kernel[(len(logits),)](logits, logits.stride(0), targets, losses, logits.shape[1], BLOCK=BLOCK, num_warps=WARPS)
    return losses


@triton.jit  # type: ignore[untyped-decorator]
def _kernel(logits, stride, targets, losses, words, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    row = tl.program_id(0).to(tl.int64)
    logits += row * stride
    target = tl.load(targets + row)
    at_target = tl.load(logits + target).to(tl.float32)
    top = tl.full((), float("-inf"), tl.float32)
    total = tl.full((), 0.0, tl.float32)
    for start in range(0, words, BLOCK):
        at = start + tl.arange(0, BLOCK)
        block = tl.load(logits + at, mask=at < words, other=float("-inf")).to(tl.float32)
        higher = tl.maximum(top, tl.max(block, 0))
        total = total * tl.exp(top - higher) + tl.sum(tl.exp(block - higher), 0)
        top = higher
    whole = top + tl.log(total)
    tl.store(losses + row, whole - at_target)
    for start in range(0, words, BLOCK):
        at = start + tl.arange(0, BLOCK)
        block = tl.load(logits + at, mask=at < words, other=float("-inf")).to(tl.float32)
        slope = tl.exp(block - whole) - tl.where(at == target, 1.0, 0.0)
        tl.store(logits + at, slope.to(logits.dtype.element_ty), mask=at < words)
