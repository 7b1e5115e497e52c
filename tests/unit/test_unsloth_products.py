"""Unsloth's products in another order are the same products; what isn't known is left to Unsloth."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from loop.trainers.unsloth_products import adapter_first


class _Quantised:
    """As bitsandbytes' state of a 4-bit weight, by where it comes from."""

    __module__ = "bitsandbytes.functional"


def _theirs(X: torch.Tensor, W: torch.Tensor, W_quant: Any, A: Any, B: Any, s: Any, out: Any = None) -> torch.Tensor:
    return X @ W.t() if A is None else X @ W.t() + (X @ A.t()) @ B.t() * s


def _given(shape: tuple[int, ...]) -> tuple[torch.Tensor, ...]:
    torch.manual_seed(0)
    half = torch.bfloat16
    return torch.randn(shape, dtype=half), torch.randn(24, 16, dtype=half), torch.randn(2, 16), torch.randn(24, 2)


@pytest.mark.parametrize("shape", [(5, 16), (2, 5, 16)])
@pytest.mark.parametrize("quantised", [True, False])
def test_the_sum_is_the_same(shape: tuple[int, ...], quantised: bool) -> None:
    """Closer to the exact one than in Unsloth's order, which rounds the large part before the small one is added."""
    X, W, A, B = _given(shape)
    stored = W / 2 if quantised else W
    seen = []

    def dequantise(weight: torch.Tensor, state: Any, **_: Any) -> torch.Tensor:
        seen.append(state)
        return weight * 2 if quantised else weight

    def never(*_: Any) -> torch.Tensor:
        raise AssertionError

    state = _Quantised() if quantised else None
    found = adapter_first(never, dequantise)(X, stored, state, A, B, 0.5)
    exact = _theirs(X.double(), W.double(), None, A.double(), B.double(), 0.5)
    theirs = _theirs(X, W, None, A.to(X.dtype), B.to(X.dtype), 0.5)
    assert found.dtype == X.dtype
    assert seen == [state]
    assert (found - exact).norm() < 5e-3 * exact.norm()
    assert (found - exact).norm() <= 1.05 * (theirs - exact).norm()


@pytest.mark.parametrize("what", ["no adapter", "into a buffer", "another state", "float32"])
def test_what_is_not_known_is_left_to_unsloth(what: str) -> None:
    """Eight bits, other formats, a buffer of its own."""
    X, W, A, B = _given((5, 16))
    calls = []

    def theirs(*given: Any) -> torch.Tensor:
        calls.append(given)
        return X

    given: list[Any] = [X, W, None, A, B, 0.5, None]
    given = {
        "no adapter": [X, W, None, None, None, None, None],
        "into a buffer": [*given[:6], X],
        "another state": [X, W, object(), *given[3:]],
        "float32": [X, W.float(), *given[2:]],
    }[what]
    assert adapter_first(theirs, lambda *_, **__: W)(*given) is X
    assert len(calls) == 1
