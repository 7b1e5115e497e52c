"""Attention over packed rows: each token sees the tokens before it of its own row, and nothing else.

On CUDA by the flash kernel for variable lengths that torch carries; elsewhere row by row. Registered with transformers
under NAME; where it is used, a model that doesn't hand the rows' starts down to its attention fails instead of leaking.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
from torch.nn import functional

NAME = "nightschool_varlen"


class NoBoundaries(RuntimeError):
    """The model's layers keep the rows' starts from their attention, or want something else of it."""


def use(model: Any) -> None:
    """Lets a transformers model, adapter and all, attend within rows; its inputs must be packed from now on."""
    from transformers import AttentionInterface

    AttentionInterface.register(NAME, attend)
    model.get_base_model().set_attn_implementation(NAME)


def use_in_unsloth() -> None:
    """Unsloth takes torch's kernel for variable lengths from torch 2.12 on, and before that launches one kernel for
    every row and layer. The kernel is the same in earlier releases: only its public name lacks grouped queries."""
    from unsloth.utils import attention_dispatch

    if getattr(attention_dispatch, "_TORCH_VARLEN_ATTN", flash_varlen) is None:
        attention_dispatch._TORCH_VARLEN_ATTN = flash_varlen


def attend(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    scaling: float | None = None,
    dropout: float = 0.0,
    cu_seq_lens_q: torch.Tensor | None = None,
    max_length_q: int = 0,
    **others: Any,
) -> tuple[torch.Tensor, None]:
    """(1 x heads x tokens x size) each, keys and values with as many heads or fewer; (1 x tokens x heads x size)."""
    asked = [name for name in ("sliding_window", "softcap", "s_aux", "position_bias") if others.get(name) is not None]
    if cu_seq_lens_q is None or asked or attention_mask is not None or not getattr(module, "is_causal", True):
        raise NoBoundaries(f"{type(module).__name__} asks its attention for {', '.join(asked) or 'no boundaries'}")
    if query.is_cuda and query.dtype in (torch.bfloat16, torch.float16) and not dropout:
        flat = [states[0].transpose(0, 1) for states in (query, key, value)]
        out = flash_varlen(
            flat[0], flat[1], flat[2], cu_seq_lens_q, cu_seq_lens_q, max_length_q, max_length_q, scale=scaling
        )
        return out[None], None
    return _row_by_row(query, key, value, cu_seq_lens_q.tolist(), scaling, dropout), None


def flash_varlen(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    starts: torch.Tensor,
    key_starts: torch.Tensor,
    longest: int,
    longest_key: int,
    *,
    scale: float | None = None,
    window_size: tuple[int, int] = (-1, 0),
    enable_gqa: bool = True,
) -> torch.Tensor:
    """(tokens x heads x size). The arguments are those of torch.nn.attention.varlen.varlen_attn."""
    left, right = window_size
    window = {} if left < 0 else {"window_size_left": left, "window_size_right": right}
    out: torch.Tensor = torch.ops.aten._flash_attention_forward(
        query, key, value, starts, key_starts, longest, longest_key, 0.0, right == 0, False, scale=scale, **window
    )[0]
    return out


def _row_by_row(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, starts: list[int], scale: float | None, dropout: float
) -> torch.Tensor:
    groups = query.shape[1] // key.shape[1]
    if groups > 1:
        key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    rows = [
        functional.scaled_dot_product_attention(
            query[:, :, start:end], key[:, :, start:end], value[:, :, start:end],
            dropout_p=dropout, is_causal=True, scale=scale,
        )
        for start, end in pairwise(starts)
    ]  # fmt: skip
    return torch.cat(rows, 2).transpose(1, 2).contiguous()
