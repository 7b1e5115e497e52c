"""A step of preferences in parts: what stays together, what a part counts for, and which one needs most memory."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loop.trainers.preference_parts import Objective, PreferenceParts, Preferences, Step
from loop.trainers.preference_rows import Unit, most_of_each, plan_units
from loop.trainers.rows import Example
from loop.trainers.spec import ScheduleSpec


def _row(tokens: int, answer: int, *, replay: bool = False) -> Example:
    return Example("row", tuple(range(tokens)), tokens - answer, replay)


PAIRS = [Unit("a", (_row(6, 3), _row(8, 5))), Unit("b", (_row(5, 2), _row(6, 3))), Unit("c", (_row(4, 1), _row(4, 1)))]
THUMBS = [Unit(str(number), (_row(tokens, 3),), number % 2 == 0) for number, tokens in enumerate((9, 5, 4))]
REPLAY = [_row(6, 4, replay=True), _row(4, 2, replay=True)]
STEP: Step = ([0, 1, 2], [0, 1])


def _parts(objective: Objective, at_once: int | None) -> PreferenceParts:
    units = THUMBS if objective == "kto" else PAIRS
    return PreferenceParts(Preferences(objective, units, REPLAY), pad_id=0, max_length=12, at_once=at_once)


def _shapes(parts: PreferenceParts, step: Step = STEP) -> list[tuple[int, ...]]:
    return [tuple(part.rows.input_ids.shape) for part in parts(step).parts]


@pytest.mark.parametrize(
    ("at_once", "expected"),
    [
        (None, [(6, 8), (2, 6)]),
        (32, [(4, 8), (2, 4), (2, 6)]),  # two pairs, padded to the longest of the four rows
        (31, [(2, 8), (4, 6), (2, 6)]),
        (11, [(2, 8), (2, 6), (2, 4), (1, 6), (1, 4)]),
        (1, [(2, 8), (2, 6), (2, 4), (1, 6), (1, 4)]),  # a longer pair or row goes alone
    ],
)
def test_pairs_stay_together_and_replay_goes_apart(at_once: int | None, expected: list[tuple[int, ...]]) -> None:
    """Rows x tokens, chosen ones before rejected ones."""
    parts = _parts("dpo", at_once)
    assert _shapes(parts) == expected
    first = parts(STEP).parts[0].rows
    pairs = len(first.answers) // 2
    answers = [(3, 5), (2, 3), (1, 1)][:pairs]
    assert first.answers.sum(1).tolist() == [answers[n][side] for side in (0, 1) for n in range(pairs)]


@pytest.mark.parametrize("objective", ["dpo", "kto"])
@pytest.mark.parametrize("at_once", [None, 20, 1])
def test_a_step_is_the_sum_of_its_parts_shares(objective: Objective, at_once: int | None) -> None:
    """Of units, of chosen answers' tokens, of replay answers' tokens."""
    parts = _parts(objective, at_once)(STEP).parts
    units, held = ([part for part in parts if part.held is kind] for kind in (False, True))
    assert sum(part.of_units for part in units) == pytest.approx(1)
    assert sum(part.of_tokens for part in units) == pytest.approx(1)
    assert sum(part.of_tokens for part in held) == pytest.approx(1)


def test_a_thumbs_drift_is_the_whole_steps_in_parts_too() -> None:
    """Each prompt with its neighbour's answer, however the thumbs are parted."""
    whole, parted = (_parts("kto", at_once)(STEP) for at_once in (None, 1))
    assert [len(some.input_ids) for some in whole.mismatched] == [3]
    assert [len(some.input_ids) for some in parted.mismatched] == [1, 1, 1]
    assert [part.good.tolist() for part in parted.parts if part.good is not None] == [[True], [False], [True]]
    assert _parts("dpo", None)(STEP).mismatched == _parts("kto", None)(([], [0])).mismatched == ()


def test_the_heaviest_part_counts_both_rows_of_a_pair_and_padding() -> None:
    """Of all steps; replay rows too, where they are longer."""
    plan: list[Step] = [([2], [0, 1]), ([1, 2], []), ([0], [1])]
    assert _parts("dpo", None).heaviest(plan) == ([1, 2], [])
    assert _parts("dpo", 16).heaviest(plan) == ([0], [])
    assert _parts("dpo", None).heaviest([([2], [0, 1])]) == ([], [0, 1])
    assert _parts("kto", None).heaviest(plan) == ([], [0, 1])
    assert _parts("kto", 6).heaviest(plan) == ([0], [])


@given(
    units=st.integers(1, 60),
    replay=st.integers(0, 60),
    share=st.floats(0, 0.9),
    batch_size=st.integers(1, 33),
    epochs=st.floats(0.5, 4),
    least=st.integers(1, 40),
)
def test_no_step_has_more_than_was_said_beforehand(
    units: int, replay: int, share: float, batch_size: int, epochs: float, least: int
) -> None:
    """Neither units nor replay rows; and no more than one too many is said, in a plan of many steps."""
    schedule = ScheduleSpec(batch_size=batch_size, replay_share=share, epochs=epochs, min_steps=least)
    plan = plan_units([PAIRS[0]] * units, [REPLAY[0]] * replay, schedule, seed=0)
    said = most_of_each(units, replay, schedule)
    for number, most in enumerate(said):
        found = max(len(step[number]) for step in plan)
        assert found <= most
        if len(plan) > 20:
            assert most <= found + 1
