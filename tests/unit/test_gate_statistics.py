"""The statistics of the gate: exact at small n, honest at large n."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from loop import gate_statistics as statistics

COUNTS = st.integers(0, 60)


def test_mcnemar_is_the_sign_test_of_the_items_that_differ() -> None:
    """Five losses without a win: one in 32."""
    assert statistics.mcnemar_loss(5, 0) == pytest.approx(1 / 32)
    assert statistics.mcnemar_loss(0, 0) == 1.0
    assert statistics.mcnemar_gain(1, 7) == pytest.approx((1 + 8) / 256)


@given(lost=COUNTS, won=COUNTS)
def test_a_loss_and_a_gain_are_never_both_significant(lost: int, won: int) -> None:
    """The two tails overlap in the seen outcome only, so they add up to at least one."""
    assert statistics.mcnemar_loss(lost, won) + statistics.mcnemar_gain(lost, won) >= 1


@given(lost=st.integers(0, 7), won=st.integers(0, 7))
def test_the_permutation_test_of_0_and_1_is_mcnemars(lost: int, won: int) -> None:
    """On binary scores both condition on the same items, so they agree exactly."""
    differences = [1.0] * lost + [-1.0] * won + [0.0] * 5
    assert statistics.permutation_loss(differences) == pytest.approx(statistics.mcnemar_loss(lost, won))


def test_the_sampled_permutation_test_agrees_with_the_exact_one() -> None:
    """Above the enumeration's limit the p-value is sampled, and never zero."""
    assert statistics.permutation_loss([1.0] * 12 + [-1.0] * 8) == pytest.approx(
        statistics.mcnemar_loss(12, 8), abs=0.01
    )
    assert 0 < statistics.permutation_loss([0.5] * 60) < 0.001


def test_holm_against_a_worked_example() -> None:
    """Steps of n, n-1, ... and never decreasing."""
    assert statistics.holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert statistics.holm([0.9, 0.8]) == [1.0, 1.0]
    assert statistics.holm([]) == []


@given(st.lists(st.floats(0, 1), min_size=1, max_size=12))
def test_holm_only_raises(p_values: list[float]) -> None:
    """An adjusted p-value is no smaller than the raw one, no larger than Bonferroni's, and keeps the order."""
    adjusted = statistics.holm(p_values)
    for raw, new in zip(p_values, adjusted, strict=True):
        assert raw <= new <= min(1.0, raw * len(p_values)) + 1e-12
    order = sorted(range(len(p_values)), key=lambda index: p_values[index])
    assert [adjusted[index] for index in order] == sorted(adjusted)


@given(lost=st.integers(0, 20), won=st.integers(0, 20), n=st.integers(50, 400))
def test_the_bound_lies_above_the_estimate_and_moves_with_the_counts(lost: int, won: int, n: int) -> None:
    """More losses raise it, more wins lower it, and it never falls below what was seen."""
    bound = statistics.loss_upper_bound(lost, won, n)
    assert (lost - won) / n < bound <= 1
    assert statistics.loss_upper_bound(lost + 1, won, n) > bound
    assert statistics.loss_upper_bound(lost, won + 1, n) < bound


def test_the_bound_with_nothing_discordant_is_no_tighter_than_the_exact_one() -> None:
    """0 of 50 lost: Clopper and Pearson's exact upper bound is 5.8 points."""
    for n in (8, 50, 300, 2000):
        exact = 1 - 0.05 ** (1 / n)
        assert exact <= statistics.loss_upper_bound(0, 0, n) <= 1.35 * exact + 0.01
    assert statistics.loss_upper_bound(0, 0, 0) == 1.0


def test_the_bound_covers_by_enumeration() -> None:
    """At n = 50, for every supposed truth, all outcomes enumerated: the bound is above it 95 times in 100."""
    n = 50
    outcomes = [(lost, won) for lost in range(n + 1) for won in range(n + 1 - lost)]
    bounds = np.array([statistics.loss_upper_bound(lost, won, n) for lost, won in outcomes])
    coefficients = np.array(
        [math.lgamma(n + 1) - math.lgamma(x + 1) - math.lgamma(y + 1) - math.lgamma(n - x - y + 1) for x, y in outcomes]
    )
    counts = np.array(outcomes)
    for p_won in (1e-9, 0.02, 0.1):
        for loss in np.arange(0.002, 0.3, 0.004):
            logs = np.log(np.array([p_won + loss, p_won, 1 - 2 * p_won - loss]))
            chances = np.exp(coefficients + counts @ logs[:2] + (n - counts.sum(axis=1)) * logs[2])
            assert chances[bounds >= loss].sum() >= 0.95


def test_the_graded_bound_agrees_with_the_binary_one() -> None:
    """On 0/1 scores with a few discordant items both say the same, within half a point."""
    differences = [1.0] * 12 + [-1.0] * 9 + [0.0] * 379
    binary = statistics.loss_upper_bound(12, 9, 400)
    assert statistics.graded_loss_upper_bound(differences) == pytest.approx(binary, abs=0.005)
    assert statistics.graded_loss_upper_bound([]) == 1.0


def test_needed_items_are_the_published_ones() -> None:
    """The profiles' promise: 2.5 points need about 2,000 items, 8 points some hundreds."""
    assert 1900 <= statistics.standalone_items(0.025) <= 2000
    assert 150 <= statistics.standalone_items(0.08) <= 300


@given(lost=st.integers(0, 12), won=st.integers(0, 12), n=st.integers(30, 300))
def test_so_many_more_items_do_decide(lost: int, won: int, n: int) -> None:
    """With the items asked for, at the same rates, either the bound is below the margin or the loss significant."""
    more = statistics.items_that_decide(lost, won, n, 0.05)
    if more is None:
        return
    scale = (n + more) / n
    bounded = statistics.loss_upper_bound(lost * scale, won * scale, n + more) < 0.05
    significant = lost > won and (lost - won) * scale / math.sqrt((lost + won) * scale) >= 1.644
    assert bounded or significant


def _draw(p_lost: float, p_won: float, n: int, runs: int) -> NDArray[np.int64]:
    chances = [p_lost, p_won, 1 - p_lost - p_won]
    return np.random.default_rng(7).multinomial(n, chances, size=runs)


def test_two_runs_of_the_same_model_are_rarely_called_a_loss() -> None:
    """A/A with 10 % noise, five families under Holm: at least 95 of 100 are not blocked by the loss tests."""
    draws = [_draw(0.05, 0.05, n, 400) for n in (2000, 300, 100, 60, 24)]
    unblocked = 0
    for run in zip(*draws, strict=True):
        adjusted = statistics.holm([statistics.mcnemar_loss(int(lost), int(won)) for lost, won, _ in run])
        unblocked += min(adjusted) > 0.05
    assert unblocked / 400 >= 0.95


def test_a_planted_loss_of_two_points_is_stopped() -> None:
    """n = 2,000, 10 % discordant, 2 points lost: at least 80 of 100 have a significant loss on their own."""
    stopped = sum(statistics.mcnemar_loss(int(lost), int(won)) <= 0.05 for lost, won, _ in _draw(0.06, 0.04, 2000, 400))
    assert stopped / 400 >= 0.80
