"""The decision: each rule with its own reason, and every doubt closes the gate."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest

from loop.gate import GateVerdict, decide
from loop.gate_families import POOL, Family, PairedItem
from loop.settings import GateSettings
from loop.tables import NightState

DEMO = GateSettings.profile("demo")
QUICK = {"base": 0.5, "current": 0.5, "candidate": 0.6}


def family(name: str, n: int, *, right: int = 0, lost: int = 0, won: int = 0, base: int | None = None) -> Family:
    """n items of which the current model has `right`; the candidate loses the first, wins the last ones."""
    items = []
    for index in range(n):
        current = float(index < right)
        candidate = 0.0 if index < lost else 1.0 if index >= n - won else current
        items.append(
            PairedItem(f"{name}-{index}", float(index < (right if base is None else base)), current, candidate)
        )
    return Family(name, tuple(items))


def night(**changed: Family) -> list[Family]:
    """A good first night of the demo's size; keyword arguments replace families by name (`task_x` for `task:x`)."""
    families = {
        "trained": family("trained", 24, won=23),
        "held_out": family("held_out", 48, won=45),
        "good_answers": family("good_answers", 40, right=40),
        "task_general": family("task:general", 260, right=180, lost=2, won=2),
        "task_choices": family("task:choices", 300, right=210, lost=6, won=5),
    }
    return list({**families, **changed}.values())


def judge(families: list[Family], *, applied: bool | None = True, settings: GateSettings = DEMO) -> GateVerdict:
    expected = {item.name: item.n for item in families}
    return decide(families, expected, applied=applied, seconds_an_answer=QUICK, settings=settings)


def test_a_good_night_passes() -> None:
    """Flagged prompts fixed, nothing else lost: it awaits approval, and every bound shown is below the margin."""
    verdict = judge(night())
    assert verdict.passed, verdict.reason
    assert all(line.loss_bound < 0.08 for line in verdict.families if line.bound_by != "pool")


def test_a_copy_of_the_current_model_is_called_not_applied() -> None:
    """A/A: no loss, but the rule about effect has its own words."""
    same = [family("trained", 24), family("good_answers", 300, right=300)]
    verdict = judge(same, applied=False)
    assert verdict.state is NightState.REJECTED
    assert verdict.reason.startswith("not applied")


def test_a_candidate_without_effect_need_not_be_examined() -> None:
    """The finding stands without families; with an effect, missing families are incomplete evidence."""
    for applied, says in ((False, "not applied"), (True, "incomplete"), (None, "incomplete")):
        verdict = decide([], {"trained": 24}, applied=applied, seconds_an_answer={}, settings=DEMO)
        assert not verdict.passed
        assert says in verdict.reason


def test_no_difference_from_base_is_called_something_went_wrong() -> None:
    """Applied, and yet not one flagged prompt scores otherwise than with the base."""
    verdict = judge(night(trained=family("trained", 24), held_out=family("held_out", 48)))
    assert verdict.state is NightState.REJECTED
    assert "+0 % against base" in verdict.reason


def test_no_gain_over_the_current_model_is_rejected() -> None:
    """Better than the base, but not than what serves."""
    verdict = judge(night(trained=family("trained", 24, right=12, base=0)))
    assert verdict.state is NightState.REJECTED
    assert verdict.reason.startswith("no gain on the flagged prompts")


def test_a_fix_learned_by_heart_is_rejected() -> None:
    """Trained prompts right, held-out ones no better."""
    verdict = judge(night(held_out=family("held_out", 48)))
    assert verdict.state is NightState.REJECTED
    assert verdict.reason.startswith("no gain on the held-out prompts")


def test_held_out_prompts_that_are_right_already_need_no_gain_but_may_not_be_lost() -> None:
    """After a good night few held-out prompts are left to win; losing them still counts."""
    full = family("held_out", 48, right=47)
    assert judge(night(held_out=full)).passed
    verdict = judge(night(held_out=family("held_out", 48, right=47, lost=9)))
    assert verdict.reason.startswith("significant loss in held_out")


def test_earlier_fixes_are_not_paid_for_with_new_ones() -> None:
    """However much the new labels gain; beside flagged prompts alone they are no exam of what the base knew."""
    new = family("trained", 155, won=123)
    kept = family("earlier_fixes", 200, right=200, lost=2)
    assert judge(night(trained=new, earlier=kept, held_out=family("held_out", 48, right=47))).passed
    lost = family("earlier_fixes", 200, right=200, lost=21)
    verdict = judge(night(trained=new, earlier=lost, held_out=family("held_out", 48, right=47)))
    assert verdict.state is NightState.REJECTED
    assert verdict.reason.startswith("significant loss in earlier_fixes: 100 % -> 90 % of 200 (21 newly wrong")
    assert judge([new, kept]).reason.startswith("nothing examines what must stay")


@pytest.mark.parametrize("name", ["good_answers", "task_general", "task_choices"])
def test_a_significant_loss_in_any_family_is_rejected_by_name(name: str) -> None:
    """One family's loss is enough, however well all others do."""
    n = {"good_answers": 40, "task_general": 260, "task_choices": 300}[name]
    verdict = judge(night(**{name: family(name.replace("task_", "task:"), n, right=n, lost=12)}))
    assert verdict.state is NightState.REJECTED
    assert f"significant loss in {name.replace('task_', 'task:')}" in verdict.reason


def test_small_losses_everywhere_are_a_loss_together() -> None:
    """No family alone is significant; the pool is."""
    families = [family("trained", 24, won=23), *[family(f"task:{k}", 100, right=100, lost=4) for k in "abcdef"]]
    verdict = judge(families)
    assert verdict.state is NightState.REJECTED
    assert "over the pooled families" in verdict.reason


def test_too_little_evidence_is_inconclusive_and_says_how_much_more() -> None:
    """Twelve good answers can't show that nothing was lost."""
    verdict = judge([family("trained", 24, won=23), family("good_answers", 12, right=12)])
    assert verdict.state is NightState.INCONCLUSIVE
    assert "more items decide it" in verdict.reason
    line = next(line for line in verdict.families if line.name == "good_answers")
    assert line.needed
    enough = judge([family("trained", 24, won=23), family("good_answers", 12 + line.needed, right=12 + line.needed)])
    assert enough.passed, enough.reason


def test_how_many_more_reckons_with_the_other_families() -> None:
    """Ten lost and two won of 51 would be a loss by itself; beside four other tests it takes more of the like."""
    verdict = judge(night(good_answers=family("good_answers", 51, right=49, lost=10, won=2)))
    assert verdict.state is NightState.INCONCLUSIVE
    line = next(line for line in verdict.families if line.name == "good_answers")
    assert line.needed
    assert line.needed > 3
    times = (51 + line.needed) / 51
    more = family("good_answers", 51 + line.needed, right=60, lost=round(10 * times) + 1, won=round(2 * times))
    assert judge(night(good_answers=more)).reason.startswith("significant loss in good_answers")


def test_a_gain_that_may_be_chance_is_inconclusive() -> None:
    """Two of eight won and none lost: p = 0.25."""
    verdict = judge(night(trained=family("trained", 8, won=2)))
    assert verdict.state is NightState.INCONCLUSIVE
    assert "may be chance" in verdict.reason


def test_small_families_lean_on_the_pool_and_large_ones_stand_alone() -> None:
    """40 good answers pass with the others' help; 300 choices must be bounded by themselves."""
    by_name = {line.name: line.bound_by for line in judge(night()).families}
    assert by_name == {
        "trained": "gain",
        "held_out": "gain",
        "good_answers": "pool",
        "task:general": "own",
        "task:choices": "own",
        POOL: "own",
    }


def test_gains_on_flagged_prompts_never_pay_for_losses_elsewhere() -> None:
    """A family that gained is not in the pool."""
    big = family("trained", 400, won=390)
    verdict = judge(night(trained=big, good_answers=family("good_answers", 40, right=40, lost=2)))
    pool = next(line for line in verdict.families if line.name == POOL)
    assert pool.n == 40 + 260 + 300
    assert pool.lost == 2 + 2 + 6


def test_a_slow_candidate_is_rejected() -> None:
    """Five times the time an answer, where four is allowed."""
    families = night()
    verdict = decide(
        families,
        {item.name: item.n for item in families},
        applied=True,
        seconds_an_answer={"current": 0.5, "candidate": 2.5},
        settings=DEMO,
    )
    assert verdict.state is NightState.REJECTED
    assert verdict.reason.startswith("latency")


def _with_score(value: float) -> list[Family]:
    bad = family("good_answers", 40, right=40)
    items = (replace(bad.items[0], candidate=value), *bad.items[1:])
    return night(good_answers=Family("good_answers", items))


def _doubled() -> list[Family]:
    bad = family("good_answers", 40, right=40)
    return night(good_answers=Family("good_answers", (bad.items[0], *bad.items[:39])))


@pytest.mark.parametrize(
    ("families", "says"),
    [
        (_with_score(math.nan), "nan"),
        (_with_score(math.inf), "inf"),
        (_with_score(-1.0), "-1.0"),
        (_doubled(), "an item twice"),
        (night(good_answers=Family("good_answers", ())), "no items"),
        (night(good_answers=family("good_answers", 39, right=39)), "39 items instead of 40"),
        (night()[1:], "trained is missing"),
        ([*night()[:2]], "is missing"),
        ([*night(), night()[-1]], "2 times"),
        (night(task_general=replace(night()[3], silent=("current",))), "the engine was ill"),
    ],
)
def test_evidence_that_is_not_whole_never_passes(families: list[Family], says: str) -> None:
    """NaN, missing, doubled or cut short: INCONCLUSIVE, with what is wrong."""
    expected = {item.name: item.n for item in night()}
    verdict = decide(families, expected, applied=True, seconds_an_answer=QUICK, settings=DEMO)
    assert verdict.state is NightState.INCONCLUSIVE
    assert any(says in finding.reason for finding in verdict.findings), verdict.findings


def test_a_gate_that_examines_only_flagged_prompts_never_passes() -> None:
    """Fixes alone say nothing of what they cost; the hint says what to add."""
    verdict = judge(night()[:2])
    assert verdict.state is NightState.INCONCLUSIVE
    assert verdict.reason.startswith("nothing examines what must stay")
    assert "general_probes" in verdict.hint


def test_unmeasured_effect_or_time_never_passes() -> None:
    """The two measurements beside the families fail closed as well."""
    assert judge(night(), applied=None).state is NightState.INCONCLUSIVE
    families = night()
    expected = {item.name: item.n for item in families}
    for seconds in ({}, {"current": 0.5}, {"current": 0.0, "candidate": 0.5}, {"current": math.nan, "candidate": 1.0}):
        verdict = decide(families, expected, applied=True, seconds_an_answer=seconds, settings=DEMO)
        assert verdict.state is NightState.INCONCLUSIVE


def test_a_candidate_that_answers_nothing_is_rejected() -> None:
    """Empty answers are named, not counted as ordinary mistakes."""
    verdict = judge(night(good_answers=replace(family("good_answers", 40, right=40, lost=40), silent=("candidate",))))
    assert verdict.state is NightState.REJECTED
    assert "only empty answers" in verdict.reason


def test_graded_scores_are_compared_item_by_item() -> None:
    """A task scored in parts (say F1) goes through the permutation test."""
    items = tuple(PairedItem(str(i), 0.9, 0.9, 0.6 if i % 2 else 0.9) for i in range(60))
    verdict = judge(night(task_general=Family("task:general", items)))
    assert "significant loss in task:general" in verdict.reason


def _noisy(name: str, n: int, p_lost: float, p_won: float, random: np.random.Generator) -> Family:
    lost, won, _ = random.multinomial(n, [p_lost, p_won, 1 - p_lost - p_won])
    return family(name, n, right=int(n * 0.7), lost=int(lost), won=int(won))


def test_the_same_model_twice_is_seldom_rejected_for_a_loss() -> None:
    """A/A through the whole gate, 10 % noise: at least 95 of 100 runs have no finding about a loss."""
    random = np.random.default_rng(11)
    standard = GateSettings.profile("standard")
    clean = 0
    for _ in range(200):
        families = [
            family("trained", 24),
            _noisy("good_answers", 300, 0.05, 0.05, random),
            _noisy("task:a", 2000, 0.05, 0.05, random),
            _noisy("task:b", 500, 0.05, 0.05, random),
        ]
        verdict = judge(families, applied=False, settings=standard)
        assert verdict.reason.startswith("not applied")
        clean += all(finding.rule != "loss" for finding in verdict.findings)
    assert clean >= 0.95 * 200


def test_a_planted_loss_of_two_points_does_not_pass() -> None:
    """n = 2,000, all flagged prompts fixed, 2 points lost elsewhere: at least 80 of 100 are stopped."""
    random = np.random.default_rng(12)
    standard = GateSettings.profile("standard")
    runs = [
        judge([family("trained", 24, won=23), _noisy("task:a", 2000, 0.06, 0.04, random)], settings=standard)
        for _ in range(200)
    ]
    assert sum(not verdict.passed for verdict in runs) >= 0.80 * 200
    assert sum(verdict.state is NightState.REJECTED for verdict in runs) >= 0.80 * 200


def test_luck_in_a_large_family_hides_no_loss_in_small_ones() -> None:
    """As seen: wrong labels lost a fifth of the good answers, and 260 probes went either way."""
    verdict = judge(
        night(
            trained=family("trained", 303, right=199, lost=12, won=73),
            held_out=family("held_out", 52, right=51, lost=5),
            good_answers=family("good_answers", 51, right=48, lost=10, won=2),
            task_general=family("task:general", 260, right=127, lost=20, won=17),
            task_choices=family("task:choices", 152, right=117, lost=1, won=2),
        )
    )
    assert verdict.state is NightState.REJECTED
    assert "over the pooled families" in verdict.reason
    pool = next(line for line in verdict.families if line.name == POOL)
    assert pool.n == 52 + 51 + 152, "the probes can be bounded alone"


def test_no_pool_excuses_a_loss_that_is_seen() -> None:
    """Four of 40 good answers lost is no proof; to call it no loss would be a lie."""
    families = night(
        good_answers=family("good_answers", 40, right=40, lost=4), task_choices=family("task:choices", 180, right=150)
    )
    verdict = judge(families)
    assert verdict.state is NightState.INCONCLUSIVE
    assert "good_answers" in verdict.reason


def test_losses_of_many_nights_add_up_against_the_base() -> None:
    """Each night lost a little against the last one; together they are far below the base."""
    drifted = family("task:general", 260, right=150, lost=3, won=2, base=180)
    verdict = judge(night(task_general=drifted))
    assert verdict.state is NightState.REJECTED
    assert "in task:general against base" in verdict.reason
