"""Each alarm over a replayed series: raised when it must be, once, told as over, and silent on a healthy run."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from loop.watch.alarms import Alarm, Alarms
from loop.watch.samples import Sample
from loop.watch.settings import AlarmSettings

GB = 1e9
Series = Iterable[dict[str, Any]]


def healthy(steps: int = 300, seed: int = 0) -> Iterator[dict[str, Any]]:
    """A run as they go: the loss falls with noise, batches differ, the card is warm."""
    chance = random.Random(seed)
    for step in range(1, steps + 1):
        yield {
            "at": 2.0 * step,
            "step": step,
            "loss": 0.3 + 3 * math.exp(-step / 40) * chance.uniform(0.7, 1.4) + chance.expovariate(20),
            "grad_norm": chance.uniform(0.3, 1.6),
            "tokens_per_s": chance.uniform(9000, 11000),
            "memory_bytes": chance.uniform(9.5, 10.5) * GB,
            "temperature_c": chance.uniform(60, 78),
            "power_w": 600.0,
            "power_cap_w": 700.0,
            "power_capped": False,
            "clock_mhz": 1900.0,
            "clock_max_mhz": 1980.0,
            "disk_free_bytes": 90 * GB,
        }


def changed(series: Series, first: int, last: int, **values: Any) -> Iterator[dict[str, Any]]:
    """From step `first` to `last`, these values instead; a function gets the step."""
    for sample in series:
        if first <= sample["step"] <= last:
            sample |= {key: value(sample["step"]) if callable(value) else value for key, value in values.items()}
        yield sample


def replay(folder: Path, series: Series, **settings: Any) -> list[Alarm]:
    """Through a file of JSON lines, as a recorded run is looked at again."""
    path = folder / "series.jsonl"
    path.write_text("".join(json.dumps(sample) + "\n" for sample in series))
    alarms = Alarms(AlarmSettings.model_validate(settings), clip=1.0)
    samples = [Sample.model_validate(json.loads(line)) for line in path.read_text().splitlines()]
    return [alarm for sample in samples for alarm in alarms.look(sample)]


@pytest.mark.parametrize("seed", range(5))
def test_a_healthy_run_raises_nothing(tmp_path: Path, seed: int) -> None:
    assert replay(tmp_path, healthy(seed=seed)) == []


def test_a_loss_spike_is_told_with_the_step_before_it(tmp_path: Path) -> None:
    """Three steps in a row far above the median: raised at the third, with the step to go back to; over at the next."""
    raised, over = replay(tmp_path, changed(healthy(), 200, 203, loss=9.0))
    assert (raised.kind, raised.action, raised.step, raised.onset_step) == ("loss_spike", "roll_back", 202, 199)
    assert "loss 9" in raised.message
    assert (over.over, over.step) == (True, 204)


def test_one_hard_batch_is_no_spike(tmp_path: Path) -> None:
    """Nor are two; and a loss that falls steeply at first is none."""
    assert replay(tmp_path, changed(healthy(), 200, 201, loss=9.0)) == []


def test_spikes_do_not_become_the_scale_they_are_judged_by(tmp_path: Path) -> None:
    """A loss that stays high stays an alarm: its own values never enter the median."""
    (raised,) = replay(tmp_path, changed(healthy(), 200, 300, loss=9.0))
    assert raised.step == 202


def test_a_gradient_that_is_always_clipped_is_told(tmp_path: Path) -> None:
    """The median of a window, so that single large norms say nothing."""
    assert replay(tmp_path, changed(healthy(), 100, 120, grad_norm=50.0)) == []
    raised, over = replay(tmp_path, changed(healthy(), 100, 200, grad_norm=50.0))
    assert (raised.kind, raised.action, raised.step) == ("gradient_norm", "warn", 124)
    assert over.over


def test_throughput_that_drops_is_told_against_the_best_of_the_run(tmp_path: Path) -> None:
    """Throttled to a third; over when it is back. Steps during which we paused the trainer do not count."""
    raised, over = replay(tmp_path, changed(healthy(), 150, 220, tokens_per_s=3000.0))
    assert (raised.kind, over.over) == ("throughput", True)
    assert raised.step is not None
    assert 150 <= raised.step <= 165
    assert "of this run's best (10,4" in raised.message
    assert replay(tmp_path, changed(healthy(), 150, 220, tokens_per_s=3000.0, paused=True)) == []


def test_a_speed_about_the_limit_is_told_once(tmp_path: Path) -> None:
    """Now 58 %, now 62 % of the best: one alarm, not one a step."""
    wavering = changed(healthy(), 150, 290, tokens_per_s=lambda step: 5800.0 if step // 25 % 2 else 6300.0)
    assert [alarm.over for alarm in replay(tmp_path, wavering)] in ([False], [False, True])


def test_another_base_is_another_speed_and_another_memory(tmp_path: Path) -> None:
    """The last steps on the unquantised base are slower and larger: no alarm."""
    finish = changed(healthy(), 220, 300, tokens_per_s=4000.0, memory_bytes=20 * GB, unquantised=True)
    assert replay(tmp_path, finish) == []


def test_another_objective_has_other_losses_and_gradients(tmp_path: Path) -> None:
    """Fine-tuned to almost nothing, pairs begin at ln 2, slower and larger: no alarm, and a spike of theirs is one."""
    learnt = changed(healthy(), 1, 300, objective="sft")
    pairs = {"objective": "dpo", "loss": 0.69, "grad_norm": 4.0, "tokens_per_s": 4000.0, "memory_bytes": 20 * GB}
    series = list(changed(changed(learnt, 100, 200, loss=0.01), 201, 300, **pairs))
    assert replay(tmp_path, series) == []
    raised, over = replay(tmp_path, changed(series, 260, 263, loss=9.0))
    assert (raised.kind, raised.onset_step, over.over) == ("loss_spike", 259, True)


def test_gradients_of_the_objective_before_do_not_count(tmp_path: Path) -> None:
    """A window of clipped steps is one objective's: the roll back must not go behind where it begins."""
    series = changed(changed(healthy(), 1, 200, objective="sft"), 201, 300, objective="dpo")
    (raised,) = replay(tmp_path, changed(series, 190, 300, grad_norm=50.0))
    assert (raised.kind, raised.step, raised.onset_step) == ("gradient_norm", 250, 200)


def test_memory_that_creeps_is_told(tmp_path: Path) -> None:
    """Half a per cent a step: raised once the window lies a third above the first one."""
    (raised,) = replay(tmp_path, changed(healthy(), 60, 300, memory_bytes=lambda step: (10 + 0.05 * (step - 60)) * GB))
    assert (raised.kind, raised.action) == ("memory_growth", "warn")
    assert "10.0" in raised.message


def test_heat_slows_down_until_it_is_well_below(tmp_path: Path) -> None:
    """Above 85 C for 30 s; at 83 it still counts as hot, at 79 it is over. A short peak is nothing."""
    assert replay(tmp_path, changed(healthy(), 100, 110, temperature_c=90.0)) == []
    series = changed(changed(healthy(), 100, 130, temperature_c=90.0), 131, 150, temperature_c=83.0)
    raised, over = replay(tmp_path, series)
    assert (raised.kind, raised.action, raised.step) == ("temperature", "slow_down", 115)
    assert (over.over, over.step) == (True, 151)


def test_a_power_cap_is_told_where_it_holds_the_clock_down(tmp_path: Path) -> None:
    """For five minutes, and with the clock well down; at full clock, drawing all one may is no trouble."""
    capped = {"power_w": 699.0, "power_capped": True}
    assert replay(tmp_path, changed(healthy(), 50, 300, **capped)) == []
    (raised,) = replay(tmp_path, changed(healthy(), 50, 300, **capped, clock_mhz=1200.0))
    assert (raised.kind, raised.action, raised.step) == ("power_capped", "warn", 200)
    assert "1200 of 1980 MHz" in raised.message


def test_a_real_card_at_its_cap(tmp_path: Path) -> None:
    """An H100 under full load runs at 1,335 of 1,980 MHz: told after a minute here, and over once it idles."""
    recorded = Path(__file__).parent.parent / "recorded" / "h100_full_load.jsonl"
    series = [json.loads(line) for line in recorded.read_text().splitlines()]
    assert replay(tmp_path, series) == []
    raised, over = replay(tmp_path, series, power_capped={"seconds": 60})
    assert "at 700 W; clock 1335 of 1980 MHz" in raised.message
    assert (raised.kind, over.over) == ("power_capped", True)


def test_without_the_drivers_word_power_at_its_limit_counts(tmp_path: Path) -> None:
    (raised,) = replay(tmp_path, changed(healthy(), 50, 300, power_w=690.0, power_capped=None, clock_mhz=1200.0))
    assert raised.kind == "power_capped"


def test_a_disk_that_fills_stops_before_it_is_full(tmp_path: Path) -> None:
    (raised,) = replay(tmp_path, changed(healthy(), 100, 300, disk_free_bytes=lambda step: (3 - step / 100) * GB))
    assert (raised.kind, raised.action) == ("disk_filling", "stop")
    assert "resume" in raised.hint


def silence(seconds: int, after: int = 100, paused: Iterable[int] = ()) -> Iterator[dict[str, Any]]:
    """`after` steps, then nothing but looks, one every ten seconds."""
    yield from healthy(after)
    for look in range(0, seconds, 10):
        yield {"at": 2.0 * after + look, "step": None, "paused": look in paused}


def test_a_trainer_that_says_nothing_is_told(tmp_path: Path) -> None:
    """After `seconds`; what we paused ourselves does not count; before the first step there is more patience."""
    limits = {"no_progress": {"seconds": 600, "start_seconds": 2000}}
    (raised,) = replay(tmp_path, silence(1000), **limits)
    assert (raised.kind, raised.action) == ("no_progress", "restart")
    assert "610 s since the last step" in raised.message
    assert replay(tmp_path, silence(1000, paused=range(100, 900)), **limits) == []
    assert replay(tmp_path, silence(1900, after=0), **limits) == []
    assert "since the start" in replay(tmp_path, silence(2100, after=0), **limits)[0].message


def test_slow_steps_are_no_silence(tmp_path: Path) -> None:
    """A step a minute: ten minutes without one are ten steps, not a hang."""
    series = [{"at": 60.0 * step, "step": step} for step in range(1, 30)]
    waiting = [{"at": 60.0 * 29 + look, "step": None} for look in range(0, 900, 10)]
    assert replay(tmp_path, [*series, *waiting], no_progress={"seconds": 300}) == []


def test_an_alarm_that_is_off_is_never_raised(tmp_path: Path) -> None:
    assert replay(tmp_path, changed(healthy(), 200, 300, loss=9.0), loss_spike={"action": "off"}) == []


def test_after_a_roll_back_the_scale_begins_anew(tmp_path: Path) -> None:
    """Steps that come again are no spike against the ones that were thrown away."""
    alarms = Alarms(AlarmSettings(), clip=1.0)
    samples = [Sample.model_validate(sample) for sample in changed(healthy(), 200, 202, loss=9.0)]
    assert [alarm.kind for sample in samples[:202] for alarm in alarms.look(sample)] == ["loss_spike"]
    alarms.restart()
    high = [sample.model_copy(update={"loss": 5.0}) for sample in samples[:20]]
    assert [alarm for sample in high for alarm in alarms.look(sample)] == []


@pytest.mark.parametrize(
    "wrong",
    [
        {"temperature": {"action": "roll_back"}},
        {"not_a_number": {"action": "warn"}},
        {"loss_spike": {"action": "slow_down"}},
        {"loss_spike": {"deviations": 1}},
        {"rate_factor": 1.5},
        {"surprise": {}},
    ],
)
def test_an_action_that_can_not_help_is_refused(wrong: dict[str, Any]) -> None:
    """A lower learning rate cools no card; a NaN can't be left alone."""
    with pytest.raises(ValidationError):
        AlarmSettings.model_validate(wrong)
