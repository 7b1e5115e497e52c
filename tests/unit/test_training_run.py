"""A trainer that runs out of memory is started again with the next plan; for nothing else."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from loop import training_run
from loop.cost import night_cost
from loop.executors import ChildCrashed, ChildFailed
from loop.memory_plan import Plan
from loop.memory_record import MemoryOutcome, MemoryRecord, in_words, read_record, write_record
from loop.training_run import with_smaller_plans
from loop.watch.settings import CostSettings


def plan(tokens: int) -> Plan:
    return Plan(micro_tokens=tokens, estimated_bytes=tokens, budget_bytes=99, device="cpu", tokens_per_s=1)


class Trainer:
    """Ends as it is told, one ending a start; notes which plan it was started with."""

    def __init__(self, out_dir: Path, *endings: Exception | None) -> None:
        self._out_dir, self._endings = out_dir, list(endings)
        self.plans: list[int] = []
        write_record(out_dir, MemoryRecord(run_digest="d", machine="m", plans=(plan(3), plan(2), plan(1))))

    async def start(self) -> None:
        record = read_record(self._out_dir)
        assert record is not None
        self.plans.append(record.plans[0].micro_tokens)
        if (ending := self._endings.pop(0)) is not None:
            raise ending


def out_of_memory() -> ChildFailed:
    return ChildFailed("no memory left", child_code="out_of_memory")


async def test_each_time_that_memory_runs_out_the_next_plan_is_taken(tmp_path: Path) -> None:
    trainer, told = Trainer(tmp_path, out_of_memory(), out_of_memory(), None), []
    await with_smaller_plans(trainer.start, tmp_path, lambda plan: told.append(plan.micro_tokens))
    assert trainer.plans == [3, 2, 1]
    assert told == [2, 1]


async def test_below_the_last_plan_there_is_none(tmp_path: Path) -> None:
    """The trainer's own error stands, not an endless loop."""
    trainer = Trainer(tmp_path, *[out_of_memory() for _ in range(3)])
    with pytest.raises(ChildFailed, match="no memory left"):
        await with_smaller_plans(trainer.start, tmp_path, lambda plan: None)
    assert trainer.plans == [3, 2, 1]


async def test_other_ends_change_no_plan(tmp_path: Path) -> None:
    """A diverged run, and a trainer that a person killed, end the training."""
    for ending in (ChildFailed("nan", child_code="training_diverged"), ChildCrashed("was killed (SIGKILL)")):
        trainer = Trainer(tmp_path, ending)
        with pytest.raises(type(ending)):
            await with_smaller_plans(trainer.start, tmp_path, lambda plan: None)
        record = read_record(tmp_path)
        assert record is not None
        assert (len(record.plans), record.attempts) == (3, ())


async def test_one_that_the_kernel_killed_ran_out_of_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It could not say so itself: the kernel's count tells."""
    counts = iter((5, 6, 6, 6))
    monkeypatch.setattr(training_run, "oom_kills", lambda: next(counts))
    trainer = Trainer(tmp_path, ChildCrashed("was killed (SIGKILL)"), None)
    await with_smaller_plans(trainer.start, tmp_path, lambda plan: None)
    assert trainer.plans == [3, 2]


def test_a_nights_cost_tells_the_plan_in_words() -> None:
    """And nothing where the base's shape is unknown."""
    outcome = MemoryOutcome(plan=plan(3), machine="host", measured_bytes=7)
    costs: dict[str, Any] = {"rates": CostSettings(), "engine_on_gpu": False, "labels": 1, "fixed": 0}
    told = night_cost({}, {"memory": outcome.model_dump(mode="json")}, {}, **costs)
    assert told["memory"] == in_words(outcome)
    assert night_cost({}, {"memory": None}, {}, **costs)["memory"] is None
