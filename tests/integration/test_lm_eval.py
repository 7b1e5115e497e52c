"""lm-eval itself, offline, against the real engine: rows by our ids, both kinds of task, nothing measured twice."""

from __future__ import annotations

from pathlib import Path

import pytest

from loop.adapter_files import base_digest
from loop.digests import write_jsonl
from loop.evaluation_cache import EvaluationCache
from loop.executors import ChildFailed, LocalExecutor
from loop.lm_eval import Harness, Served, run_tasks
from loop.settings import TaskSettings
from tests.conftest import VllmServer

TASK = """
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: "@FOLDER@/{data}"}}}}
test_split: test
output_type: {kind}
doc_to_text: "{text}"
doc_to_target: {target}
{more}
metric_list:
  - {{metric: {metric}, aggregation: mean, higher_is_better: true}}
metadata: {{version: 1}}
"""
CAPITALS = {"France": "Paris", "Italy": "Rome", "Germany": "Berlin", "Spain": "Madrid"}


@pytest.fixture
def tasks(tmp_path: Path) -> list[TaskSettings]:
    """Two tasks in one folder, as a project would write them."""
    folder = tmp_path / "exam"
    folder.mkdir()
    questions = {country: f"What is the capital of {country}?" for country in CAPITALS}
    write_jsonl(
        folder / "free.jsonl",
        [{"id": f"free-{c}", "question": questions[c], "answer": a} for c, a in CAPITALS.items()],
    )
    write_jsonl(
        folder / "ranked.jsonl",
        [
            {"id": f"ranked-{c}", "question": questions[c], "choices": [a, "Helsinki"], "gold": 0}
            for c, a in CAPITALS.items()
        ],
    )
    generation = 'generation_kwargs: {until: ["\\n"], max_gen_toks: 16, do_sample: false, temperature: 0}'
    (folder / "free.yaml").write_text(
        TASK.format(
            name="free", data="free.jsonl", kind="generate_until", text="{{question}}", target="answer",
            metric="exact_match", more=generation,
        )
    )  # fmt: skip
    (folder / "ranked.yaml").write_text(
        TASK.format(
            name="ranked", data="ranked.jsonl", kind="multiple_choice", text="Question: {{question}}\\nAnswer:",
            target="gold", metric="acc", more="doc_to_choice: choices",
        )
    )  # fmt: skip
    return [
        TaskSettings(name="free", folder=folder, metric="exact_match", kind="generate_until"),
        TaskSettings(name="ranked", folder=folder, metric="acc", kind="multiple_choice"),
    ]


def harness(server: VllmServer, folder: Path) -> Harness:
    folder.mkdir(exist_ok=True)
    return Harness(
        executor=LocalExecutor(),
        cache=EvaluationCache(folder),
        url=server.url,
        api_key="",
        base_dir=server.base_dir,
        base_digest=base_digest(server.base_dir),
        engine={"dtype": "bfloat16"},
        max_length=1024,
        folder=folder,
    )


async def test_rows_come_back_by_id_and_only_once(
    vllm_server: VllmServer, tasks: list[TaskSettings], tmp_path: Path
) -> None:
    """Generated and ranked items with scores and answers; a second run is read, not measured; a changed task is not."""
    bench = harness(vllm_server, tmp_path / "scratch")
    base = Served(vllm_server.base_name, "sha256:w")
    rows = (await run_tasks(bench, tasks, [base]))[base.name]
    assert [row["id"] for row in rows["free"]] == [f"free-{country}" for country in CAPITALS]
    assert any("Paris" in row["answer"] for row in rows["free"])
    assert {row["prompt"] for row in rows["ranked"]} == {f"What is the capital of {c}?" for c in CAPITALS}
    ranked = {row["id"]: row for row in rows["ranked"]}
    assert all((row["score"] == 1.0) == (row["answer"] != "Helsinki") for row in ranked.values())
    assert sum(row["score"] for row in ranked.values()) >= 3

    log = bench.folder / "lm_eval.log"
    before = log.stat().st_size
    assert (await run_tasks(bench, tasks, [base]))[base.name] == rows
    assert log.stat().st_size == before
    assert not (bench.folder / "huggingface").exists()


async def test_a_metric_that_a_task_lacks_is_named(
    vllm_server: VllmServer, tasks: list[TaskSettings], tmp_path: Path
) -> None:
    """With those that it has; nothing is kept."""
    bench = harness(vllm_server, tmp_path / "scratch")
    wrong = tasks[1].model_copy(update={"metric": "f1"})
    with pytest.raises(ChildFailed, match="no metric 'f1'; it gives acc"):
        await run_tasks(bench, [wrong], [Served(vllm_server.base_name, "sha256:w")])
