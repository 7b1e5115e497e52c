"""A step of preferences in parts: what stays together, what a part counts for, and which one needs most memory."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from itertools import count
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loop.trainers.preference_loss import Padded
from loop.trainers.preference_parts import Objective, PreferenceParts, Preferences, Step, StepParts
from loop.trainers.preference_rows import Unit, most_of_each, plan_units
from loop.trainers.rows import Example
from loop.trainers.spec import ScheduleSpec
from loop.trainers.team import ALONE, Team


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
    assert [(len(some.rows.input_ids), some.of_rows) for some in whole.drift] == [(3, 1)]
    assert [(len(some.rows.input_ids), some.of_rows) for some in parted.drift] == [(1, 1 / 3)] * 3
    assert [part.good.tolist() for part in parted.parts if part.good is not None] == [[True], [False], [True]]
    assert _parts("dpo", None)(STEP).drift == _parts("kto", None)(([], [0])).drift == ()


def test_the_heaviest_part_counts_both_rows_of_a_pair_and_padding() -> None:
    """Of all steps; replay rows too, where they are longer."""
    plan: list[Step] = [([2], [0, 1]), ([1, 2], []), ([0], [1])]
    assert _parts("dpo", None).heaviest(plan) == ([1, 2], [])
    assert _parts("dpo", 16).heaviest(plan) == ([0], [])
    assert _parts("dpo", None).heaviest([([2], [0, 1])]) == ([], [0, 1])
    assert _parts("kto", None).heaviest(plan) == ([], [0, 1])
    assert _parts("kto", 6).heaviest(plan) == ([0], [])


def _rows_of(parts: Iterable[Padded]) -> list[tuple[int, ...]]:
    """Each row's tokens, without padding (an answer is last)."""
    found = []
    for some in parts:
        for ids, answers in zip(some.input_ids.tolist(), some.answers.tolist(), strict=True):
            found.append(tuple(ids[: len(answers) - answers[::-1].index(True)]))
    return sorted(found)


SIZES = st.tuples(st.integers(1, 9), st.integers(1, 12))  # of a prompt, of an answer


@given(
    objective=st.sampled_from(["dpo", "orpo", "kto"]),
    sizes=st.lists(st.tuples(SIZES, SIZES), min_size=1, max_size=12),
    held=st.lists(SIZES, max_size=9),
    ranks=st.integers(2, 4),
    at_once=st.none() | st.integers(1, 90),
    sharded=st.booleans(),
)
def test_ranks_make_up_the_step(
    objective: Objective, sizes: list[Any], held: list[Any], ranks: int, at_once: int | None, sharded: bool
) -> None:
    """Every row once, its shares those of the whole step, thumbs' neighbours too; who holds the base with others has as
    many parts of each kind as they, idle ones of no weight."""
    number = count(3)

    def row(prompt: int, answer: int, *, replay: bool = False) -> Example:
        return Example("row", tuple(next(number) for _ in range(prompt + answer)), prompt, replay)

    pairs = objective != "kto"
    units = [Unit("u", tuple(row(*size) for size in both[: 1 + pairs]), None if pairs else True) for both in sizes]
    replay = [row(*size, replay=True) for size in held]
    make = PreferenceParts(Preferences(objective, units, replay), pad_id=0, max_length=21, at_once=at_once)
    step: Step = (list(range(len(units))), list(range(len(replay))))
    (whole, *of_ranks) = [
        make(step, team) for team in (ALONE, *(Team(rank, ranks, sharded=sharded) for rank in range(ranks)))
    ]
    kinds: list[Callable[[StepParts], list[float]]] = [
        lambda some: [part.of_tokens for part in some.parts if not part.held],
        lambda some: [part.of_tokens for part in some.parts if part.held],
        lambda some: [part.of_rows for part in some.drift],
    ]
    for kind in kinds:
        assert sum(sum(kind(some)) for some in of_ranks) == pytest.approx(sum(kind(whole)))
        if sharded:
            assert len({len(kind(some)) for some in of_ranks}) == 1
        else:
            assert all(all(kind(some)) for some in of_ranks), "nothing is idle"
    for some in of_ranks:
        assert [part.held for part in some.parts] == sorted(part.held for part in some.parts)
        assert some.units == len(units)
    real = [part for some in of_ranks for part in some.parts if part.of_tokens]
    assert sum(part.of_units for part in real) == pytest.approx(1)
    assert _rows_of(part.rows for part in real) == _rows_of(part.rows for part in whole.parts)
    drift = [part.rows for some in of_ranks for part in some.drift if part.of_rows]
    assert _rows_of(drift) == _rows_of(part.rows for part in whole.drift)
    assert len(drift) == 0 if pairs else sum(len(rows.input_ids) for rows in drift) == len(units)
    heaviest = make._weight(make.heaviest([step], ranks))
    assert heaviest == max(part.rows.input_ids.numel() for part in real)


@given(sizes=st.lists(st.tuples(SIZES, SIZES), max_size=12), held=st.lists(SIZES, max_size=9), ranks=st.integers(1, 4))
def test_ranks_have_as_much_to_do(sizes: list[Any], held: list[Any], ranks: int) -> None:
    """Units and replay rows together; no rank has more tokens than another by more than the longest of them."""
    units = [Unit("u", (_row(sum(one), one[1]), _row(sum(other), other[1]))) for one, other in sizes]
    replay = [_row(sum(size), size[1], replay=True) for size in held]
    make = PreferenceParts(Preferences("dpo", units, replay), pad_id=0, max_length=21)
    dealt = make.deal((list(range(len(units))), list(range(len(replay)))), ranks)
    tokens = [sum(units[n].tokens for n in own) + sum(len(replay[n].tokens) for n in others) for own, others in dealt]
    longest = max([*(unit.tokens for unit in units), *(len(row.tokens) for row in replay)], default=0)
    assert max(tokens) - min(tokens) <= longest
    assert sum(tokens) == sum(unit.tokens for unit in units) + sum(len(row.tokens) for row in replay)


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
