"""A step's numbers are told while the next one runs: late, but the same, in order, and never after its checkpoint."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer, models
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from loop.trainers import late_log, sft_loop
from loop.trainers.checkpoints import CHECKPOINTS
from loop.trainers.late_log import LateLog
from loop.trainers.loss import retention_loss
from loop.trainers.rows import Example
from loop.trainers.spec import Progress, TrainSpec

STEPS, SAVE = 5, 3
SHAPE = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}


class _Told:
    """What a trainer tells its parent, and what it has kept by then."""

    def __init__(self, checkpoints: Path) -> None:
        self.lines: list[Progress] = []
        self.kept: list[list[str]] = []
        self.phases: dict[str, float] = {}
        self._checkpoints = checkpoints

    def mark(self, phase: str) -> None:
        self.phases.setdefault(phase, 0.0)

    def step(self, progress: Progress) -> None:
        self.lines.append(progress)
        self.kept.append(sorted(path.parent.name for path in self._checkpoints.glob("*/trainer_state.json")))

    def elapsed_seconds(self) -> float:
        return float(len(self.lines))


def _train(folder: Path) -> _Told:
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**SHAPE, num_attention_heads=2, num_key_value_heads=1))
    model = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    given = {"max_steps": STEPS, "batch_size": 2, "save_steps": SAVE, "learning_rate": 1e-2, "replay_share": 0.0}
    spec = TrainSpec.model_validate(
        {
            "base_dir": folder, "base_name": "base", "base_digest": "sha256:0", "data_dir": folder, "out_dir": folder,
            "quantisation": "none", "schedule": given, "memory": {"checkpointing": "off"},
        }
    )  # fmt: skip
    rows = [Example(str(n), tuple(range(n + 1, n + 9)), 4, replay=False) for n in range(6)]
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE()), eos_token="e", pad_token="e")
    told = _Told(folder / CHECKPOINTS)
    sft_loop.train(spec, model, tokenizer, rows, "sha256:1", told)  # type: ignore[arg-type]
    return told


@pytest.fixture
def late(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU."""
    monkeypatch.setattr(sft_loop, "late_log_for", lambda device: LateLog())


def test_late_lines_are_the_same_lines(tmp_path: Path, late: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every step, once, in order, with its own loss, norm and rate; a checkpoint's and the last one included."""
    got = _train(tmp_path / "late")
    monkeypatch.setattr(sft_loop, "late_log_for", lambda device: None)
    wanted = _train(tmp_path / "at once")
    clock = {"elapsed_s", "tokens_per_s", "memory_bytes"}
    assert [line.step for line in got.lines] == list(range(1, STEPS + 1))
    assert [line.model_dump(exclude=clock) for line in got.lines] == [
        line.model_dump(exclude=clock) for line in wanted.lines
    ]
    assert len({line.loss for line in got.lines}) == STEPS


def test_speed_is_a_steps_own(tmp_path: Path, late: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """From the end of the step before, not from line to line: the last line comes as soon as the step is done."""
    ends = iter([10.0, 12.0, 16.0, 17.0, 17.5])
    monkeypatch.setattr(late_log, "time", SimpleNamespace(monotonic=lambda: next(ends)))
    told = _train(tmp_path)
    assert [line.tokens_per_s for line in told.lines[1:]] == [16 / 2, 16 / 4, 16 / 1, 16 / 0.5]


def test_a_step_is_told_before_it_is_kept(tmp_path: Path, late: None) -> None:
    """Else a checkpoint of a run gone wrong would count as complete."""
    told = _train(tmp_path)
    assert told.kept[SAVE - 1] == []
    assert told.kept[SAVE] == [f"checkpoint-{SAVE}"]


def test_a_run_gone_wrong_still_stops(tmp_path: Path, late: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """One step later than where numbers are at hand at once, and not a checkpoint later."""
    calls, loss = [], retention_loss

    def breaking(*given: Any) -> torch.Tensor:
        calls.append(1)
        return loss(*given) * (float("nan") if len(calls) == 3 else 1.0)  # the first is a trial: of step 2

    monkeypatch.setattr(sft_loop, "retention_loss", breaking)
    with pytest.raises(sft_loop.Diverged, match="at step 2"):
        _train(tmp_path)
    assert len(calls) == 4
    assert not list(tmp_path.glob("**/checkpoint-*"))
