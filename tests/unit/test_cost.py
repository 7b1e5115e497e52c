"""What a night cost: quantities that were measured, money at the configured rates, and null for everything else."""

from __future__ import annotations

from typing import Any

import pytest

from loop.cost import night_cost
from loop.watch.settings import CostSettings
from loop.watch.told import cost_lines, training_lines

STAGES = {"train": 600.0, "evaluate": 300.0}
ON_GPU = {"gpu_minutes": 10.0, "energy_wh": 80.0}


def cost(watched: dict[str, Any], rates: dict[str, Any], **changed: Any) -> dict[str, Any]:
    given: dict[str, Any] = {"engine_on_gpu": True, "labels": 30, "fixed": 12, **changed}
    return night_cost(STAGES, {"steps": 80}, watched, rates=CostSettings.model_validate(rates), **given)


def test_gpu_minutes_energy_and_money_per_label_and_per_fixed_prompt() -> None:
    """10 minutes of training and 5 of the exam at 2.40 an hour, 80 Wh at 0.25 a kWh: 0.62."""
    found = cost(ON_GPU, {"gpu_hour": 2.4, "kwh": 0.25})
    assert (found["gpu_minutes"], found["energy_wh"], found["money"]) == (15.0, 80.0, 0.62)
    assert found["per_label"] == {"gpu_minutes": 0.5, "energy_wh": pytest.approx(80 / 30, abs=1e-4), "money": 0.02067}
    assert found["per_fixed"]["money"] == pytest.approx(0.62 / 12, abs=1e-4)
    assert "0.62 EUR" in "\n".join(cost_lines(found))
    assert "A fixed prompt (12)" in "\n".join(cost_lines(found))


@pytest.mark.parametrize(
    ("watched", "rates", "on_gpu"),
    [
        (ON_GPU, {}, True),  # no rate
        ({"gpu_minutes": 10.0, "energy_wh": None}, {"gpu_hour": 2.4, "kwh": 0.25}, True),  # energy not measured
        ({"gpu_minutes": None, "energy_wh": None}, {"gpu_hour": 2.4}, False),  # no GPU
        ({}, {"kwh": 0.25}, True),  # an older night
    ],
)
def test_money_is_never_invented(watched: dict[str, Any], rates: dict[str, Any], on_gpu: bool) -> None:
    """A rate without its quantity, or no rate: null, not the part that is known."""
    found = cost(watched, rates, engine_on_gpu=on_gpu)
    assert found["money"] is None
    assert found["per_label"]["money"] is None
    assert "EUR" not in "\n".join(cost_lines(found))


def test_nothing_fixed_has_no_price() -> None:
    """No division by zero, no infinite cost; and on a CPU nothing is said of a GPU."""
    assert cost(ON_GPU, {"gpu_hour": 1}, fixed=0)["per_fixed"] == {
        "gpu_minutes": None,
        "energy_wh": None,
        "money": None,
    }
    assert cost_lines(cost({}, {}, engine_on_gpu=False)) == []


def test_a_report_tells_what_happened_to_the_training() -> None:
    """Limited by time, rolled back, alarms with step and action; a smooth run adds no line."""
    alarm = {"kind": "loss_spike", "action": "roll_back", "message": "loss 9", "step": 40, "over": False}
    told = {
        **{"steps": 60, "planned_steps": 100, "time_limited": True, "rate_scale": 0.5, "roll_backs": 1, "restarts": 0},
        "alarms": [alarm, {**alarm, "over": True}],
    }
    lines = "\n".join(training_lines(told))
    assert "**limited by time**: 60 of 100 planned steps" in lines
    assert "learning rate x 0.5" in lines
    assert lines.count("alarm loss spike at step 40 (roll_back): loss 9") == 1
    assert training_lines({"steps": 100, "planned_steps": 100, "time_limited": False, "alarms": []}) == []
