"""The axolotl backend in its own environment (`make axolotl`), as the night starts it; skipped where there is none."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from loop.adapter_files import check, read_base_config
from loop.executors import ChildFailed, LocalExecutor
from loop.settings import LINEAR_LAYERS
from loop.trainers.preference_rows import write_preferences
from loop.trainers.spec import TrainSpec, read_result
from tests.conftest import ROOT
from tests.integration.test_preference_training import THINGS, _pairs, _thumbs
from tests.integration.test_trainer import _prepare, tiny_dir

PYTHON = ROOT / ".venv-axolotl" / "bin" / "python"
pytestmark = [pytest.mark.slow, pytest.mark.skipif(not PYTHON.exists(), reason="`make axolotl` has not been run")]
__all__ = ["tiny_dir"]  # the fixture
RECIPE: dict[str, Any] = {
    "quantisation": "none",
    "schedule": {
        **{"learning_rate": 2e-3, "max_steps": 6, "batch_size": 6, "epochs": 100, "save_steps": 2},
        **{"replay_loss": "ce", "scheduler": "constant"},
    },
    "preference": {"learning_rate": 2e-3},
}


async def _train(spec: TrainSpec) -> list[dict[str, Any]]:
    lines: list[dict[str, Any]] = []
    await LocalExecutor().run(
        "loop.trainers.axolotl",
        spec.out_dir / "spec.json",
        on_progress=lines.append,
        log_path=spec.out_dir / "trainer.log",
        environment={"CUDA_VISIBLE_DEVICES": ""},
        python=str(PYTHON),
    )
    return lines


def _is_servable(spec: TrainSpec) -> None:
    files = check(
        spec.out_dir / "adapter",
        read_base_config(spec.base_dir),
        max_rank=16,
        target_modules=LINEAR_LAYERS,
        base_name="served-base",
    )
    assert files.effect_norm > 0


async def test_axolotl_trains_the_answers_of_our_rows_and_nothing_else(tiny_dir: Path, tmp_path: Path) -> None:
    """Six steps; every one told; the rows go in as our tokeniser makes them; the adapter is one that engines serve."""
    spec = _prepare(tmp_path, tiny_dir, **RECIPE)
    lines = await _train(spec)
    assert [line["step"] for line in lines] == list(range(1, 7))
    assert {line["total_steps"] for line in lines} == {6}
    assert lines[-1]["loss"] < lines[0]["loss"]
    result = read_result(spec.out_dir)
    assert result is not None
    assert (result.steps, result.examples, result.method) == (6, 6, "sft")
    assert result.packages["axolotl"] == "0.19.0"
    _is_servable(spec)
    (data,) = spec.out_dir.glob("axolotl-*/data.jsonl")
    rows = [json.loads(line) for line in data.read_text().splitlines()]
    assert len(rows) == 36
    for row in rows:
        trained = [token for token, label in zip(row["input_ids"], row["labels"], strict=True) if label != -100]
        assert trained == row["input_ids"][-len(trained) :]
        assert row["labels"][: -len(trained)] == [-100] * (len(row["labels"]) - len(trained))
    again = await _train(spec)
    assert again == [], "a finished run is not repeated"


@pytest.mark.parametrize("method", ["dpo", "kto"])
async def test_axolotl_trains_preferences(method: str, tiny_dir: Path, tmp_path: Path) -> None:
    """Pairs and thumbs, tokenised by trl exactly as we would."""
    rows = [
        {
            "id": "r",
            "kind": "label",
            "messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}],
        }
    ]
    spec = _prepare(tmp_path, tiny_dir, rows, **RECIPE, method=method)
    write_preferences(tmp_path, _pairs(THINGS), []) if method == "dpo" else write_preferences(
        tmp_path, [], _thumbs(THINGS)
    )
    lines = await _train(spec)
    assert len(lines) == 6
    result = read_result(spec.out_dir)
    assert result is not None
    assert (result.method, result.examples) == (method, len(THINGS))
    _is_servable(spec)


async def test_what_axolotl_does_not_train_is_named(tiny_dir: Path, tmp_path: Path) -> None:
    """Should a spec get past the preflight."""
    spec = _prepare(tmp_path, tiny_dir, **RECIPE, method="orpo")
    with pytest.raises(ChildFailed, match="does not train 'orpo'") as failed:
        await _train(spec)
    assert failed.value.child_code == "not_by_axolotl"
