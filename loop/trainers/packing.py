"""Whether rows may be packed into one sequence with this base: never where one row could reach into the next.

First by what the base's config says of it, then by a trial on the loaded model: rows must come out as they do alone,
and must not change with their neighbour.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
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
STRAY = 0.05  # relative: what rounding makes of another order of sums; deep models are measured
STRAY_TIMES = 4  # as far as a row strays alone, when it is only computed in other shapes
STRAY_MOST = 0.3  # whatever was measured: a row with another row's tokens, or at other places, is beyond it
TOUCHED = 1e-3  # relative: another neighbour, the same shapes and kernels


class PackingRefused(InvalidInput):
    code = "packing_refused"
    default_hint = 'Set trainer.packing = "auto" or "off": rows are padded then.'


@dataclass(frozen=True)
class Layout:
    """`packed` or not, and the reason where it is not. `even`: rows of one length may go unpacked all the same.

    `attention` is what the model had before.
    """

    packed: bool
    reason: str = ""
    even: bool = False
    attention: str = ""


def choose(wanted: Literal["auto", "on", "off"], model: Any, amp: Amp) -> Layout:
    """Packed unless switched off or unsafe; leaves the model's attention ready for it. Raises PackingRefused."""
    if wanted == "off":
        return Layout(False, 'trainer.packing = "off"')
    config = model.get_base_model().config.get_text_config()
    before = config._attn_implementation
    reason = unsafe_by_config(config) or _unsafe_by_trial(model, config, amp)
    if not reason:
        return Layout(True, even=_takes_unpacked(model, config, amp), attention=before)
    if wanted == "on":
        raise PackingRefused(f"rows can't be packed with this base: {reason}")
    return Layout(False, reason)


def leave(layout: Layout, model: Any) -> None:
    """Gives the model its own attention back: what it trains on next may come padded."""
    if layout.packed:
        model.get_base_model().set_attn_implementation(layout.attention)


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
    parts = _trial(config, packed=False)
    alone = torch.cat([_states(model, part, amp)[0] for part in parts])
    rounding = _away(
        alone, torch.cat([_states(model, _widened(part), amp)[0, : part.input_ids.shape[1]] for part in parts])
    )
    try:
        varlen_attention.use(model)
        packed, touched = (_states(model, part, amp)[0] for part in _trial(config, packed=True))
    except (varlen_attention.NoBoundaries, RuntimeError, TypeError, ValueError) as error:
        reason = f"its attention does not keep rows apart ({error})"
    else:
        reason = _differences(alone, packed, touched, rounding)
    if reason:
        model.get_base_model().set_attn_implementation(before)
    return reason


def _takes_unpacked(model: Any, config: Any, amp: Amp) -> bool:
    """Ours refuses a sequence without boundaries; Unsloth's layers take either."""
    try:
        _states(model, _trial(config, packed=False)[0], amp)
    except varlen_attention.NoBoundaries:
        return False
    return True


def _differences(alone: torch.Tensor, packed: torch.Tensor, touched: torch.Tensor, rounding: float) -> str:
    """`touched`: as `packed`, with other tokens in the first row. `rounding`: how far rows alone are from rows alone,
    computed in other shapes: of bfloat16, with 32 layers and more to grow in, several per cent."""
    stray = _away(alone, packed)
    most = min(max(STRAY, STRAY_TIMES * rounding), STRAY_MOST)
    reach = _away(packed[TRIAL_LENGTHS[0] :], touched[TRIAL_LENGTHS[0] :])
    if not reach <= TOUCHED:
        return f"in a trial a row changed with its neighbour (by {reach:.1e})"
    if not stray <= most:
        return f"in a trial rows came out otherwise than alone (by {stray:.1e}, where rounding makes {rounding:.1e})"
    return ""


def _away(states: torch.Tensor, others: torch.Tensor) -> float:
    """Relative; over all tokens at once, as single ones may be near zero."""
    return float((states - others).norm() / states.norm())


def _widened(part: Part) -> Part:
    """The row twice over, padded to as many tokens as are packed: causal attention must not let it see any of that."""
    ids = torch.zeros((2, sum(TRIAL_LENGTHS)), dtype=part.input_ids.dtype)
    ids[:, : part.input_ids.shape[1]] = part.input_ids
    return replace(part, input_ids=ids)


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
    return states.float()
