"""Which method a night takes, what it is refused for, and what a backend can't do."""

from __future__ import annotations

import pytest

from loop.backends import limits
from loop.methods import METHODS, Choice, Needed, OnHand, TooFew, choose, shortage
from loop.settings import BadRecipe, TrainerSettings

NEEDED = Needed(labels=8, thumbs=16)
NONE = OnHand(corrections=0, preferences=0, pairs=0, good_thumbs=0, bad_thumbs=0)


def on_hand(**counts: int) -> OnHand:
    return OnHand(**{**vars(NONE), **counts})


@pytest.mark.parametrize(
    ("have", "method"),
    [
        (on_hand(corrections=8, pairs=8), "sft"),
        (on_hand(corrections=1, preferences=30, pairs=31), "sft"),
        (on_hand(preferences=8, pairs=8), "dpo"),
        (on_hand(preferences=8, pairs=8, older_labels=9, older_corrections=9), "sft"),
        (on_hand(preferences=8, pairs=8, older_labels=9), "dpo"),
        (on_hand(preferences=8, pairs=3), "sft"),
        (on_hand(good_thumbs=16, bad_thumbs=16), "kto"),
        (on_hand(corrections=7, pairs=7, good_thumbs=99, bad_thumbs=16), "kto"),
        (on_hand(corrections=8, good_thumbs=99, bad_thumbs=99), "sft"),
    ],
)
def test_the_data_decide(have: OnHand, method: str) -> None:
    """Right answers before comparisons before thumbs; a project with corrections stays with sft. The reason is told."""
    choice = choose("auto", have, NEEDED)
    assert isinstance(choice, Choice)
    assert choice.method == method
    assert choice.why.startswith("auto: ")


@pytest.mark.parametrize(
    ("setting", "have", "told"),
    [
        ("auto", on_hand(corrections=1), "1 new labels; 8 are needed: 7 more"),
        ("auto", on_hand(good_thumbs=20, bad_thumbs=3), "20 thumbs up and 3 down are there"),
        ("sft", on_hand(corrections=5, good_thumbs=99, bad_thumbs=99), "5 new labels; 8 are needed: 3 more"),
        ("dpo", on_hand(corrections=20, pairs=6), "6 new labels beat an answer that was shown; 8 are needed: 2 more"),
        ("orpo", on_hand(corrections=20), "0 new labels beat an answer"),
        ("sft+dpo", on_hand(corrections=20, pairs=7), "7 new labels beat an answer"),
        ("kto", on_hand(corrections=20, good_thumbs=20, bad_thumbs=3), "3 thumbs down; 16 are needed: 13 more"),
    ],
)
def test_too_few_are_told_with_the_number_that_is_missing(setting: str, have: OnHand, told: str) -> None:
    """Of the kind that the method needs."""
    few = choose(setting, have, NEEDED)
    assert isinstance(few, TooFew)
    assert told in few.reason
    assert few.hint


@pytest.mark.parametrize("method", METHODS)
def test_a_method_that_was_asked_for_is_taken_where_there_is_enough(method: str) -> None:
    """Whatever else the data would allow."""
    have = on_hand(corrections=8, pairs=8, good_thumbs=16, bad_thumbs=16)
    assert choose(method, have, NEEDED) == Choice(method, f"trainer.method = {method!r}")  # type: ignore[arg-type]
    assert TrainerSettings(method=method).method == method


def test_what_the_checks_left_over_is_counted_again() -> None:
    """With the same words, and without the setting that the project never made."""
    few = shortage("sft", on_hand(corrections=7), NEEDED)
    assert few is not None
    assert few.reason.startswith("7 new labels; 8 are needed")
    assert shortage("sft", on_hand(corrections=8), NEEDED) is None


def test_unknown_methods_and_starts_are_refused_in_a_nights_recipe_too() -> None:
    with pytest.raises(BadRecipe, match="method"):
        TrainerSettings().with_recipe({"method": "ppo"})
    with pytest.raises(BadRecipe, match="start"):
        TrainerSettings().with_recipe({"start": "yesterday"})


def test_axolotl_is_refused_what_it_would_do_otherwise() -> None:
    """Each with its cure; what is only left unused is told."""
    recipe = TrainerSettings(backend="axolotl", python="/p")
    refused = dict(limits(recipe, "sft", continues=False, replay_rows=9).refused)
    assert len(refused) == 1
    assert 'replay_loss = "ce"' in next(iter(refused.values()))
    bare = limits(TrainerSettings(backend="axolotl", replay_loss="ce"), "sft", continues=False, replay_rows=9)
    assert "make axolotl" in bare.refused[0][1]
    plain = TrainerSettings(backend="axolotl", python="/p", replay_loss="ce")
    assert limits(plain, "sft", continues=False, replay_rows=9).refused == ()
    assert "finish_share" in limits(plain, "sft", continues=False, replay_rows=9).told[0]
    assert limits(recipe, "dpo", continues=False, replay_rows=0).refused == ()
    for method, continues, rows in (("dpo", False, 9), ("orpo", False, 0), ("sft+dpo", False, 0), ("kto", True, 0)):
        assert limits(plain, method, continues=continues, replay_rows=rows).refused, method  # type: ignore[arg-type]
    assert limits(TrainerSettings(), "sft+dpo", continues=True, replay_rows=9) == limits(
        TrainerSettings(), "kto", continues=False, replay_rows=0
    )
