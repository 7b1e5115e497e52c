"""Packed rows train exactly like padded ones, or are refused; the loss in chunks is the loss."""

from __future__ import annotations

import random
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from torch.nn import functional
from transformers import (
    FalconH1Config,
    Gemma2Config,
    LlamaConfig,
    LlamaForCausalLM,
    MambaConfig,
    MistralConfig,
    Qwen2Config,
    Qwen3NextConfig,
)

from loop.trainers import head_loss, packing, varlen_attention
from loop.trainers.base_states import BaseStates, _block_starts
from loop.trainers.batches import Batches
from loop.trainers.head_loss import AfterHead, answer_loss
from loop.trainers.loss import Amp, retention_loss
from loop.trainers.packing import PackingRefused, choose, unsafe_by_config
from loop.trainers.rows import Example, heaviest, parts_of, weight

AMP = Amp("cpu", torch.float32)
LENGTHS = (5, 30, 17, 9, 22, 8, 40)


def _model(**changed: Any) -> Any:
    """SmolLM2's shape, small: grouped queries, tied head; the adapter is not zero."""
    torch.manual_seed(0)
    shape = {"vocab_size": 997, "hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 2, "head_dim": 16}
    heads = {"num_attention_heads": 3, "num_key_value_heads": 1, "tie_word_embeddings": True}
    model = LlamaForCausalLM(LlamaConfig(**{**shape, **heads, **changed}))
    targets = ["q_proj", "v_proj", "down_proj"]
    model = get_peft_model(model, LoraConfig(r=4, target_modules=targets, task_type="CAUSAL_LM"))
    for tensor in model.parameters():
        if tensor.requires_grad:
            tensor.data = torch.randn_like(tensor) * 0.1
    return model


def _examples() -> list[Example]:
    chance = random.Random(1)
    return [
        Example(str(row), tuple(chance.randrange(997) for _ in range(length)), length // 2, replay=row % 3 == 0)
        for row, length in enumerate(LENGTHS)
    ]


def _trained(model: Any, batches: Batches) -> tuple[float, torch.Tensor]:
    """A step's loss and its gradient."""
    rows = list(range(len(LENGTHS)))
    base = BaseStates(batches, [rows], AMP)
    if batches.hold:
        base.for_step(model, 0)
    model.zero_grad()
    total = 0.0
    for part in batches(rows):
        loss = retention_loss(model, part, AMP, base.of(model, part.held_rows), 1.35)
        loss.backward()
        total += float(loss.detach())
    return total, torch.cat([w.grad.flatten() for w in model.parameters() if w.grad is not None])


def _by_hand(model: Any, *, hold: bool) -> tuple[float, torch.Tensor]:
    """Every row alone, all logits at once, autograd for everything."""
    found: dict[bool, list[torch.Tensor]] = {False: [], True: []}
    model.zero_grad()
    for example in _examples():
        ids, at = torch.tensor([example.tokens]), slice(example.answer_start - 1, -1)
        log_probs = model(input_ids=ids).logits[0, at].log_softmax(-1)
        if hold and example.replay:
            with torch.no_grad(), model.disable_adapter():
                base = model(input_ids=ids).logits[0, at].log_softmax(-1)
            found[True].append(functional.kl_div(log_probs, base, log_target=True, reduction="none").sum(-1))
        else:
            wanted = torch.tensor(example.tokens[example.answer_start :])
            found[False].append(functional.nll_loss(log_probs, wanted, reduction="none"))
    loss = torch.cat(found[False]).mean() + (1.35 * torch.cat(found[True]).mean() if hold else 0)
    loss.backward()
    return float(loss.detach()), torch.cat([w.grad.flatten() for w in model.parameters() if w.grad is not None])


@pytest.mark.parametrize("hold", [True, False])
@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("at_once", [None, 40])
def test_every_layout_trains_as_each_row_alone(hold: bool, packed: bool, at_once: int | None) -> None:
    """Loss and gradient, with replay held by KL or trained; whole or in parts that add up."""
    model = _model()
    loss, gradient = _by_hand(model, hold=hold)
    batches = Batches(_examples(), pad_id=0, hold=hold, packed=packed, at_once=at_once)
    if packed:
        assert choose("on", model, AMP).packed
    got, slope = _trained(model, batches)
    assert got == pytest.approx(loss, rel=1e-5)
    assert (slope - gradient).abs().max() < 1e-5 * gradient.abs().max()


def test_a_row_that_saw_its_neighbour_would_show() -> None:
    """The equality above has teeth: without boundaries the loss is another one."""
    model = _model()
    batches = Batches(_examples(), pad_id=0, hold=False, packed=True)
    (part,) = batches(range(len(LENGTHS)))
    whole = replace(part, starts=torch.tensor([0, sum(LENGTHS)]), longest=sum(LENGTHS))
    assert choose("on", model, AMP).packed
    kept = retention_loss(model, part, AMP, None, 1.0).item()
    leaked = retention_loss(model, whole, AMP, None, 1.0).item()
    assert abs(kept - leaked) > 1e-4


@pytest.mark.parametrize(
    ("config", "why"),
    [
        (MistralConfig(sliding_window=4096), "sliding window"),
        (Gemma2Config(), "sliding window"),
        (MambaConfig(), "carry a state"),
        (FalconH1Config(), "carry a state"),
        (Qwen3NextConfig(), "carry a state"),
        (LlamaConfig(attention_dropout=0.1), "drops out"),
        (
            LlamaConfig(rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}),
            "length of the whole",
        ),
        (LlamaConfig(), ""),
        (MistralConfig(sliding_window=None), ""),
        (Qwen2Config(), ""),  # names a window that it doesn't use
    ],
)
def test_bases_whose_rows_would_leak_are_known_by_their_config(config: Any, why: str) -> None:
    """Windows, states, dropout and positions by length; nothing else is refused."""
    reason = unsafe_by_config(config)
    assert why in reason if why else reason == ""


def test_a_refusal_says_why_and_leaves_the_model_as_it_was() -> None:
    """ "on" stops the night with the reason; "auto" pads and tells; "off" does not even look."""
    model = _model(attention_dropout=0.1)
    before = model.get_base_model().config._attn_implementation
    with pytest.raises(PackingRefused, match="drops out attention"):
        choose("on", model, AMP)
    layout = choose("auto", model, AMP)
    assert (layout.packed, layout.reason) == (False, "it drops out attention weights")
    assert not choose("off", _model(), AMP).packed
    assert model.get_base_model().config._attn_implementation == before


def test_an_attention_that_ignores_boundaries_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """By a trial on the loaded model, whatever its config says."""

    def leaking(module: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *_: Any, **__: Any) -> Any:
        key, value = (states.repeat_interleave(query.shape[1] // states.shape[1], 1) for states in (key, value))
        out = functional.scaled_dot_product_attention(query, key, value, is_causal=True)
        return out.transpose(1, 2).contiguous(), None

    model = _model()
    monkeypatch.setattr(varlen_attention, "attend", leaking)
    layout = choose("auto", model, AMP)
    assert not layout.packed
    assert "neighbour" in layout.reason
    assert model.get_base_model().config._attn_implementation != varlen_attention.NAME
    monkeypatch.setattr(packing, "TOUCHED", 1e9)  # the second look: not as they come out alone
    assert "otherwise than alone" in choose("auto", model, AMP).reason


def test_rows_of_one_length_go_unpacked_where_the_model_takes_both() -> None:
    """There is no padding to save; the step is the same, and ours, which would refuse them, stays packed."""
    rows = [Example(str(row), tuple(range(row + 1, row + 13)), 6, replay=False) for row in range(3)]
    model = _model()
    found = []
    for even in (True, False):
        (part,) = Batches(rows, pad_id=0, hold=False, packed=True, even=even)(range(3))
        assert (part.starts is None) is even
        assert part.input_ids.shape == ((3, 12) if even else (1, 36))
        model = _model()
        if not even:
            assert choose("on", model, AMP).even is False
        found.append(retention_loss(model, part, AMP, None, 1.0).item())
    assert found[0] == pytest.approx(found[1], rel=1e-6)
    rows[0] = Example("0", rows[0].tokens[:-1], 6, replay=False)
    (part,) = Batches(rows, pad_id=0, hold=False, packed=True, even=True)(range(3))
    assert part.starts is not None


def test_a_model_that_takes_both_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    """As Unsloth's layers, which attend as they always do where they are told no boundaries."""
    attend = varlen_attention.attend

    def either(module: Any, *states: Any, **given: Any) -> Any:
        if given.get("cu_seq_lens_q") is None:
            given |= {"cu_seq_lens_q": torch.tensor([0, states[0].shape[2]], dtype=torch.int32)}
        return attend(module, *states, **given)

    monkeypatch.setattr(varlen_attention, "attend", either)
    model = _model()
    layout = choose("auto", model, AMP)
    assert (layout.packed, layout.even) == (True, True)
    packing.leave(layout, model)
    assert model.get_base_model().config._attn_implementation == layout.attention != varlen_attention.NAME


def _rounding(module: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *_: Any, **given: Any) -> Any:
    """Attention as another kernel would round it: scores and weights in bfloat16, each row by itself."""
    key, value = (states.repeat_interleave(query.shape[1] // states.shape[1], 1) for states in (key, value))
    rows = []
    for start, end in pairwise(given.get("cu_seq_lens_q", torch.tensor([0, query.shape[2]])).tolist()):
        scores = query[:, :, start:end] @ key[:, :, start:end].transpose(2, 3) / query.shape[-1] ** 0.5
        hidden = torch.full(scores.shape[2:], float("-inf"), dtype=scores.dtype).triu(1)
        rows.append((scores + hidden).softmax(-1) @ value[:, :, start:end])
    return torch.cat(rows, 2).transpose(1, 2).contiguous(), None


@pytest.mark.parametrize("leaks", [False, True])
def test_a_deep_models_rounding_is_no_leak(leaks: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """32 layers in bfloat16: further off than shallow ones may be, by rounding alone; a leak is still found."""
    amp = Amp("cpu", torch.bfloat16)
    model = _model(num_hidden_layers=32, initializer_range=0.3, hidden_size=96, num_attention_heads=6).to(amp.dtype)
    seen: list[float] = []
    away = packing._away

    def noted(*given: torch.Tensor) -> float:
        seen.append(away(*given))
        return seen[-1]

    monkeypatch.setattr(packing, "_away", noted)
    monkeypatch.setattr(packing, "TOUCHED", 1e9)  # the other look would find a leak first
    monkeypatch.setattr(
        varlen_attention,
        "attend",
        (lambda *states, cu_seq_lens_q, **given: _rounding(*states)) if leaks else _rounding,
    )
    layout = choose("auto", model, amp)
    rounding, stray, _ = seen
    assert rounding > packing.STRAY / packing.STRAY_TIMES
    assert stray > packing.STRAY
    assert layout.packed is not leaks, (layout, seen)


def test_a_packed_model_never_attends_without_boundaries() -> None:
    """A padded batch by mistake fails instead of leaking."""
    model = _model()
    assert choose("on", model, AMP).packed
    with pytest.raises(varlen_attention.NoBoundaries):
        model(input_ids=torch.tensor([[1, 2, 3]]))


@pytest.mark.parametrize("after", [AfterHead(), AfterHead(scale=0.3), AfterHead(cap=5.0), AfterHead(0.5, 4.0)])
@pytest.mark.parametrize("held", [True, False])
@pytest.mark.parametrize("frozen", [True, False])
def test_chunks_change_neither_loss_nor_gradient(
    after: AfterHead, held: bool, frozen: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Cross entropy and KL, with what families do after the head; a head with an adapter of its own trains, too."""
    monkeypatch.setattr(head_loss, "TILE", 3)
    monkeypatch.setattr(head_loss, "CHUNK_BYTES", 4 * 50 * 3)
    torch.manual_seed(0)
    head = torch.nn.Linear(8, 50, bias=True).requires_grad_(not frozen)
    states, base = torch.randn(10, 8, requires_grad=True), torch.randn(10, 8)
    targets = torch.randint(50, (10,))
    inner = AfterHead(after.scale, after.cap)
    log_probs = inner(head(states)).log_softmax(-1)
    loss = functional.nll_loss(log_probs, targets, reduction="sum")
    if held:
        bases = inner(head(base)).log_softmax(-1).detach()
        loss = functional.kl_div(log_probs, bases, log_target=True, reduction="sum")
    wanted = torch.autograd.grad(loss * 0.7, [states, *([] if frozen else [head.weight])])
    got = answer_loss(states, head, after, None if held else targets, base if held else None)
    assert got.item() == pytest.approx(loss.item(), rel=1e-5)
    found = torch.autograd.grad(got * 0.7, [states, *([] if frozen else [head.weight])])
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_no_chunk_holds_more_logits_than_it_may(monkeypatch: pytest.MonkeyPatch) -> None:
    """The point of chunks: memory of tokens x vocabulary is never asked for."""
    seen = []
    linear = functional.linear

    def watched(*given: Any) -> torch.Tensor:
        out = linear(*given)
        seen.append(out.numel() * 4)
        return out

    monkeypatch.setattr(functional, "linear", watched)
    monkeypatch.setattr(head_loss, "CHUNK_BYTES", 4 * 2000 * 256)
    head = torch.nn.Linear(4, 2000).requires_grad_(False)
    answer_loss(torch.randn(3000, 4, requires_grad=True), head, AfterHead(), torch.zeros(3000, dtype=torch.long), None)
    assert len(seen) == 12
    assert max(seen) <= 4 * 2000 * 256


def test_the_bases_side_is_computed_once_for_many_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """One pass for a block of steps, not one a step; a changed base starts a new block."""
    model, examples = _model(), _examples()
    plan = [[0, 1], [3, 2], [6, 4], [0, 5]]
    passes: list[set[int]] = []
    base = BaseStates(Batches(examples, pad_id=0, hold=True), plan, AMP, anew=[3])
    compute = base._compute

    def noted(model: Any, dealt: list[set[int]]) -> dict[int, torch.Tensor]:
        passes.extend(dealt)
        return compute(model, dealt)

    monkeypatch.setattr(base, "_compute", noted)
    for step, rows in enumerate(plan):
        base.for_step(model, step)
        held = [row for row in rows if examples[row].replay]
        states = base.of(model, held)
        assert states is not None
        assert len(states) == sum(len(examples[row].tokens) - examples[row].answer_start for row in held)
    assert passes == [{0, 1, 2, 3, 4, 6}, {0, 5}]


@given(
    sizes=st.lists(st.lists(st.integers(0, 9), min_size=1, max_size=4), min_size=1, max_size=90),
    anew=st.integers(0, 90),
)
def test_blocks_are_small_and_stop_where_the_base_changes(sizes: list[list[int]], anew: int) -> None:
    """At most 32 steps and so many bytes, unless one step alone has more."""
    flat = [size * 2**25 for step in sizes for size in step]
    rows = iter(range(len(flat)))
    plan = [[next(rows) for _ in step] for step in sizes]
    starts = _block_starts(plan, flat, frozenset({anew}))
    assert starts[0] == 0
    assert anew in starts or anew >= len(plan)
    for first, end in zip(starts, [*starts[1:], len(plan)], strict=True):
        assert 0 < end - first <= 32
        assert end - first == 1 or sum(flat[row] for step in plan[first:end] for row in step) <= 2**28


@given(
    lengths=st.lists(st.integers(1, 50), min_size=1, max_size=20),
    at_once=st.one_of(st.none(), st.integers(1, 120)),
    packed=st.booleans(),
)
def test_parts_hold_every_row_once_and_no_more_than_fits(lengths: list[int], at_once: int | None, packed: bool) -> None:
    """In their order; only a row that is too long alone goes over."""
    parts = parts_of(range(len(lengths)), lengths, at_once, packed=packed)
    assert [row for part in parts for row in part] == list(range(len(lengths)))
    weights = [weight(part, lengths, packed=packed) for part in parts]
    assert all(len(part) == 1 or at_once is None or size <= at_once for part, size in zip(parts, weights, strict=True))
    worst = heaviest([list(range(len(lengths)))], lengths, at_once, packed=packed)
    assert weight(worst, lengths, packed=packed) == max(weights)
