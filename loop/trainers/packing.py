"""Whether rows may be packed into one sequence with this base: never where one row could reach into the next.

First by what the base's config says of it, then by a trial on the loaded model: rows must come out as they do alone,
and must not change with their neighbour.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch

from labeling.errors import InvalidInput
from loop.trainers import varlen_attention
from loop.trainers.batches import Batches, Part
from loop.trainers.loss import Amp, boundaries
from loop.trainers.rows import Example

# Marks of layers that carry a state from token to token, in the configs of transformers 5.
RECURRENT = (
    "mamba",
    "ssm",
    "state_size",
    "conv_kernel",
    "linear_num_value_heads",
    "linear_attn",
    "rwkv",
    "conv_L_cache",
)
FULL_ATTENTION = {"full_attention", "attention"}
ROPE_BY_LENGTH = ("dynamic", "longrope")  # rotate by the length of the whole sequence
TRIAL_LENGTHS = (7, 12, 5)
STRAY = 0.05  # relative: what rounding to bfloat16 makes of the order of sums
TOUCHED = 1e-3  # relative: another neighbour, the same shapes and kernels


class PackingRefused(InvalidInput):
    code = "packing_refused"
    default_hint = 'Set trainer.packing = "auto" or "off": rows are padded then.'


@dataclass(frozen=True)
class Layout:
    """`packed` or not, and the reason where it is not."""

    packed: bool
    reason: str = ""


def choose(wanted: Literal["auto", "on", "off"], model: Any, amp: Amp) -> Layout:
    """Packed unless switched off or unsafe; leaves the model's attention ready for it. Raises PackingRefused."""
    if wanted == "off":
        return Layout(False, 'trainer.packing = "off"')
    config = model.get_base_model().config.get_text_config()
    reason = unsafe_by_config(config) or _unsafe_by_trial(model, config, amp)
    if reason and wanted == "on":
        raise PackingRefused(f"rows can't be packed with this base: {reason}")
    return Layout(not reason, reason)


def unsafe_by_config(config: Any) -> str:
    """Why rows would leak into each other; empty if nothing speaks against packing."""
    kinds = set(getattr(config, "layer_types", None) or ()) - FULL_ATTENTION
    if any("sliding" in kind or "chunked" in kind for kind in kinds) or _slides(config):
        return "it attends through a sliding window"
    recurrent = [mark for name in vars(config) for mark in RECURRENT if name.startswith(mark)]
    if kinds or recurrent:
        return f"some of its layers carry a state from token to token ({', '.join(sorted(kinds) or recurrent[:1])})"
    if _rope_type(config) in ROPE_BY_LENGTH:
        return f"its positions depend on the length of the whole sequence (rope {_rope_type(config)})"
    if getattr(config, "attention_dropout", 0):
        return "it drops out attention weights"
    return ""


def _slides(config: Any) -> bool:
    """Some families name a window that they don't use."""
    return bool(getattr(config, "sliding_window", None)) and bool(getattr(config, "use_sliding_window", True))


def _rope_type(config: Any) -> str:
    for name in ("rope_parameters", "rope_scaling"):
        values = getattr(config, name, None)
        if isinstance(values, dict):
            return str(values.get("rope_type", values.get("type", "")))
    return ""


def _unsafe_by_trial(model: Any, config: Any, amp: Amp) -> str:
    before = config._attn_implementation
    alone = [_states(model, rows, amp) for rows in _trial(config, packed=False)]
    try:
        varlen_attention.use(model)
        packed, touched = (_states(model, rows, amp) for rows in _trial(config, packed=True))
    except (varlen_attention.NoBoundaries, RuntimeError, TypeError, ValueError) as error:
        reason = f"its attention does not keep rows apart ({error})"
    else:
        reason = _differences(torch.cat(alone), packed, touched)
    if reason:
        model.get_base_model().set_attn_implementation(before)
    return reason


def _differences(alone: torch.Tensor, packed: torch.Tensor, touched: torch.Tensor) -> str:
    """`touched`: as `packed`, with other tokens in the first row."""
    stray = float((alone - packed).norm() / alone.norm())
    others = packed[TRIAL_LENGTHS[0] :]
    reach = float((others - touched[TRIAL_LENGTHS[0] :]).norm() / others.norm())
    if reach > TOUCHED:
        return f"in a trial a row changed with its neighbour (by {reach:.1e})"
    return f"in a trial rows came out otherwise than alone (by {stray:.1e})" if not stray <= STRAY else ""


def _trial(config: Any, *, packed: bool) -> list[Part]:
    """Packed: the rows in one sequence, and again with another first row. Otherwise: each alone."""
    words = [
        [(31 * row + 7 * place + 3) % config.vocab_size for place in range(n)] for row, n in enumerate(TRIAL_LENGTHS)
    ]
    other = [[(word + 11) % config.vocab_size for word in words[0]], *words[1:]]
    given = [words, other] if packed else [[row] for row in words]
    made = []
    for rows in given:
        examples = [Example(str(number), tuple(row), 1, replay=False) for number, row in enumerate(rows)]
        made += Batches(examples, pad_id=0, hold=False, packed=packed)(range(len(rows)))
    return made


def _states(model: Any, part: Part, amp: Amp) -> torch.Tensor:
    part = part.to(model.device)
    with torch.no_grad(), amp():
        states: torch.Tensor = (
            model.get_base_model()
            .base_model(input_ids=part.input_ids, use_cache=False, **boundaries(part))
            .last_hidden_state
        )
    return states[0].float()
