"""The train stage with the real tiny trainer and a real MLflow: every figure at every step, alarms as tags."""

from __future__ import annotations

import json
from dataclasses import replace
from datetime import date
from pathlib import Path
from typing import Any

import httpx
import pytest
import structlog

from labeling.database import Database
from loop.mlflow_registry import Registry
from loop.outputs import Delta, Preflight
from loop.settings import EngineSettings, MlflowSettings, ProjectSettings
from loop.stage import StageContext
from loop.stages import train
from loop.trainers.spec import render, write_spec
from loop.watch.sensors import RecordedSensors
from tests.integration.test_trainer import tiny_dir
from tests.running import offline_clients

__all__ = ["tiny_dir"]  # a fixture
pytestmark = pytest.mark.slow
STEPS = 6
FIGURES = (
    *("loss", "grad_norm", "learning_rate", "tokens_per_s"),
    *("gpu_memory_bytes", "utilisation", "temperature_c", "power_w"),
)
TRAINER = {"max_steps": STEPS, "batch_size": 4, "quantisation": "none", "rank": 4, "threads": 1, "save_steps": 2}


def prepared(folder: Path, base_dir: Path, database: Database, mlflow: str) -> StageContext:
    alarms = {"temperature": {"action": "warn", "seconds": 0}, "sensor_seconds": 0.2}
    project = ProjectSettings.model_validate(
        {"name": "p", "base_dir": base_dir, "base_name": "base", "trainer": {**TRAINER, "alarms": alarms}}
    )
    asked = {"messages": [{"role": "user", "content": "Who?"}, {"role": "assistant", "content": "Ines Okafor"}]}
    rows = [{"id": f"l{number}", "kind": "label", **asked} for number in range(8)]
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    spec = render(
        project.trainer, base_dir=base_dir, base_name="base", base_digest="sha256:0", data_dir=folder, out_dir=folder
    )
    write_spec(spec, folder / "preflight.json")
    own = folder / "train.1"
    own.mkdir()
    delta = Delta(
        data_dir=str(folder), digest="d", label_ids=(), label_rows=8, replay_rows=0, base_rows=0, held_out_items=0
    )
    preflight = Preflight(spec_path=str(folder / "preflight.json"), base_digest="x", checks=())
    return StageContext(
        night_id="ni_1",
        project=project,
        engine=EngineSettings(),
        date=date(2026, 1, 1),
        folder=own,
        data_dir=folder,
        clients=replace(offline_clients(database, folder), registry=Registry(MlflowSettings(url=mlflow))),
        log=structlog.get_logger(),
        progress=lambda line: None,
        inputs={Delta: delta, Preflight: preflight},
    )


async def test_every_figure_stands_in_mlflow_at_every_step(
    tiny_dir: Path, tmp_path: Path, mlflow_server: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The trainer's and the sensors', a point a step; the alarm as a tag; energy and alarm in the stage's output."""
    readings = tmp_path / "readings.jsonl"
    card = {"device": "card", "temperature_c": 97.0, "power_w": 300.0, "utilisation": 0.9, "gpu_memory_bytes": 1e9}
    readings.write_text((json.dumps(card) + "\n") * 10_000)
    monkeypatch.setattr(train, "open_sensors", lambda device: RecordedSensors(readings))
    database = Database(f"sqlite+aiosqlite:///{tmp_path}/test.db")
    context = prepared(tmp_path, tiny_dir, database, mlflow_server.url)
    trained = await train.run(context)
    await database.close()
    assert (trained.result["steps"], trained.result["time_limited"]) == (STEPS, False)
    assert trained.watched["energy_wh"] is not None
    assert trained.watched["energy_wh"] == pytest.approx(300 * trained.watched["seconds"] / 3600, rel=0.02)
    assert [alarm["kind"] for alarm in trained.watched["alarms"]] == ["temperature"]
    async with httpx.AsyncClient(base_url=f"{mlflow_server.url}/api/2.0/mlflow") as http:
        run = (await http.get("/runs/get", params={"run_id": trained.run_id})).json()["run"]
        tags = {tag["key"]: tag["value"] for tag in run["data"]["tags"]}
        assert tags["nightschool.alarm.temperature"] == "warn: 97 C, above 85 C"
        for figure in FIGURES:
            query = {"run_id": trained.run_id, "metric_key": figure}
            curve = (await http.get("/metrics/get-history", params=query)).json()["metrics"]
            assert sorted(row["step"] for row in curve) == list(range(1, STEPS + 1)), figure
