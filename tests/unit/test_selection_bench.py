"""The replay behind `nightschool bench selection`: it counts labels as it says, and nothing but the order differs."""

from __future__ import annotations

import numpy as np
import pytest

from labeling.settings import SelectionSettings
from service.bench import selection as bench
from service.bench.selection_world import Learner, generate


def of(*mended: float) -> bench.Run:
    return bench.Run(np.array(mended), np.array(mended), 1, 1)


def test_labels_needed_lies_between_two_nights() -> None:
    """Linearly; where the target is never reached, all labels count and it is said."""
    step = bench.LABELS_A_DAY
    assert list(bench.labels_needed(of(0.0, 0.2, 0.4), 0.3)) == pytest.approx([1.5 * step, True])
    assert list(bench.labels_needed(of(0.0, 0.6), 0.3)) == pytest.approx([0.5 * step, True])
    assert bench.labels_needed(of(0.0, 0.1), 0.3) == (step * bench.NIGHTS, False)


def test_saving_is_a_ratio_with_its_doubt() -> None:
    """Twice as many labels on every company: 2, surely; now more and now fewer: about 1, and the interval says so."""
    fast, slow = of(0.0, 0.4), of(0.0, 0.2, 0.4)
    assert list(bench.saving([slow] * 4, [fast] * 4, 0.4)) == pytest.approx([2, 2, 2])
    ratio, low, high = bench.saving([slow, fast] * 4, [fast, slow] * 4, 0.4)
    assert ratio == pytest.approx(1)
    assert low < 1 < high


def test_the_base_is_wrong_of_what_it_was_not_taught() -> None:
    """It knows the subjects that it was trained on, in other words too; labels teach the rest."""
    company = generate(1)
    learner = Learner(company)
    known = np.isin(company.fact, company.fact[company.known])
    exam = company.exam_weight > 0
    assert learner.right[company.known].mean() > 0.9
    assert learner.right[exam & known].mean() > 0.6
    assert not learner.right[~known].any()
    assert learner.uncertainty[~known].mean() > learner.uncertainty[known].mean()
    asked = np.flatnonzero(~known & ~exam)
    learner.learn(asked)
    assert learner.right[exam & ~known].mean() > 0.5


def test_replay_is_the_same_again_and_counts_every_label(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same seed gives the same numbers; a label on a right answer costs and mends nothing."""
    monkeypatch.setattr(bench, "NIGHTS", 3)
    company = generate(2)
    first, again = (bench.replay(company, SelectionSettings(), 2) for _ in range(2))
    assert first.mended.tolist() == again.mended.tolist()
    assert first.labels == 3 * bench.LABELS_A_DAY
    assert 0 < first.corrections <= first.labels
    assert first.mended[0] == 0
    assert first.mended[-1] > 0
    monkeypatch.setattr(bench, "FLAG_WRONG", 0.0)
    useless = bench.replay(company, SelectionSettings(), 2)
    assert (useless.corrections, useless.mended.tolist()) == (0, [0.0] * 4)
    assert useless.labels > 0
