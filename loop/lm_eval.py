"""The boundary to lm-eval: tasks in local folders, a served model, per-item scores back. It runs in a child process.

A task's folder is copied before each run and `@FOLDER@` in its YAML replaced by the copy's place, because data files
need absolute paths. Results are kept by digest, so base and current are measured once.
"""

from __future__ import annotations

import importlib.metadata
import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from labeling.errors import InvalidInput, NightschoolError
from loop.digests import canonical_json, digest_folder, write_durably
from loop.evaluation_cache import EvaluationCache
from loop.executors import Executor
from loop.settings import GateSettings, TaskSettings

PROBES = Path(__file__).parent / "general_probes"
OURS = (
    TaskSettings(name="nightschool_general", folder=PROBES, metric="contains", kind="generate_until"),
    TaskSettings(name="nightschool_choices", folder=PROBES, metric="acc", kind="multiple_choice"),
)
REQUEST_TIMEOUT_SECONDS = 300

Rows = list[dict[str, Any]]  # {id, score, prompt, answer}; score is None where it was not a number


class BadTask(InvalidInput):
    code = "bad_task"
    default_hint = "projects.gate.tasks: `folder` must hold a YAML file with `task: <name>` and its data."


class TruncatedResults(NightschoolError):
    """lm-eval ended well, but its results are not all there."""

    code = "truncated_results"


@dataclass(frozen=True)
class Served:
    """A model as the examination engine serves it, and the digest of its weights."""

    name: str
    digest: str


@dataclass(frozen=True)
class Harness:
    """Where and how tasks are run; `engine` and `base_digest` are part of every result's key."""

    executor: Executor
    cache: EvaluationCache
    url: str
    api_key: str
    base_dir: Path  # its tokenizer and chat template
    base_digest: str
    engine: Mapping[str, Any]
    max_length: int
    folder: Path  # scratch and logs


def tasks_of(gate: GateSettings) -> tuple[TaskSettings, ...]:
    return (*(OURS if gate.general_probes else ()), *gate.tasks)


def tasks_digest_parts(tasks: Sequence[TaskSettings]) -> dict[str, str]:
    return {task.name: digest_folder(_checked(task)) for task in tasks}


async def run_tasks(
    harness: Harness, tasks: Sequence[TaskSettings], models: Sequence[Served]
) -> dict[str, dict[str, Rows]]:
    """Rows by model name and task name; only what the cache lacks is measured, all of it in one child process."""
    parts = tasks_digest_parts(tasks)
    keys = {(m.name, t.name): _key(harness, m, t, parts[t.name]) for m in models for t in tasks}
    found = {pair: harness.cache.get(key) for pair, key in keys.items()}
    missing = [model for model in models if any(found[model.name, task.name] is None for task in tasks)]
    if missing:
        for pair, rows in (await _measure(harness, tasks, missing)).items():
            if _sound(rows):  # an engine that was ill is asked again, not remembered
                harness.cache.put(keys[pair], rows)
            found[pair] = rows
    return {model.name: {task.name: found[model.name, task.name] or [] for task in tasks} for model in models}


def _sound(rows: Rows) -> bool:
    return all(row["score"] is not None for row in rows) and any(row["answer"].strip() for row in rows)


def _key(harness: Harness, model: Served, task: TaskSettings, files: str) -> dict[str, Any]:
    return {
        "what": "lm-eval",
        "version": importlib.metadata.version("lm-eval"),
        "weights": model.digest,
        "base": harness.base_digest,
        "engine": dict(harness.engine),
        "max_length": harness.max_length,
        "task": task.name,
        "metric": task.metric,
        "kind": task.kind,
        "files": files,
    }


def _checked(task: TaskSettings) -> Path:
    wanted = f"task: {task.name}"
    if any(wanted in path.read_text(encoding="utf-8").splitlines() for path in task.folder.glob("*.yaml")):
        return task.folder
    raise BadTask(f"no YAML file in {task.folder} has a line `{wanted}`")


async def _measure(
    harness: Harness, tasks: Sequence[TaskSettings], models: Sequence[Served]
) -> dict[tuple[str, str], Rows]:
    out = harness.folder / "results"
    out.mkdir(parents=True, exist_ok=True)
    spec = {
        "url": harness.url,
        "served": [model.name for model in models],
        "generated": {task.name: task.metric for task in tasks if task.kind == "generate_until"},
        "ranked": {task.name: task.metric for task in tasks if task.kind == "multiple_choice"},
        "tokenizer": str(harness.base_dir.resolve()),
        "include": str(_copied(tasks, harness.folder / "tasks").resolve()),
        "max_length": harness.max_length,
        "timeout_seconds": REQUEST_TIMEOUT_SECONDS,
        "out": str(out.resolve()),
    }
    spec_path = harness.folder / "spec.json"
    write_durably(spec_path, canonical_json(spec))
    await harness.executor.run(
        "loop.lm_eval_child",
        spec_path,
        on_progress=lambda line: None,
        log_path=harness.folder / "lm_eval.log",
        environment={
            "OPENAI_API_KEY": harness.api_key or "none",
            "HF_HOME": str((harness.folder / "huggingface").resolve()),
        },
    )
    shutil.rmtree(harness.folder / "huggingface", ignore_errors=True)
    return {pair: rows for index, model in enumerate(models) for pair, rows in _read(out, index, model, tasks)}


def _read(out: Path, index: int, model: Served, tasks: Sequence[TaskSettings]) -> list[tuple[tuple[str, str], Rows]]:
    try:
        by_task: dict[str, Rows] = json.loads((out / f"{index}.json").read_bytes())
        return [((model.name, task.name), by_task[task.name]) for task in tasks]
    except (OSError, ValueError, KeyError) as error:
        raise TruncatedResults(
            f"lm-eval left no whole results for {model.name}: {error}", hint=f"Its log lies beside {out}."
        ) from error


def _copied(tasks: Sequence[TaskSettings], target: Path) -> Path:
    """Each folder once, under a number: two tasks may share one."""
    shutil.rmtree(target, ignore_errors=True)
    for number, folder in enumerate(dict.fromkeys(task.folder.resolve() for task in tasks)):
        copy = target / str(number)
        shutil.copytree(folder, copy, ignore=shutil.ignore_patterns("__pycache__"))
        for path in copy.glob("*.yaml"):
            path.write_text(path.read_text(encoding="utf-8").replace("@FOLDER@", str(copy.resolve())), encoding="utf-8")
    return target
