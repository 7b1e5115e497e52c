"""`python -m loop.lm_eval_child SPEC`: runs lm-eval's tasks against a served model. The one file that imports lm_eval.

One process for several models, since the imports alone take 12 s. Never with lm-eval's own caches: their key lacks the
model (lm-evaluation-harness #4063); `loop.evaluation_cache` holds results by digest instead.
"""

from __future__ import annotations

import argparse
import math
import sys
import traceback
from pathlib import Path
from typing import Any

from lm_eval import simple_evaluate
from lm_eval.tasks import TaskManager
from pydantic import BaseModel, ConfigDict

from labeling.errors import NightschoolError
from loop.digests import canonical_json, write_durably
from loop.trainers.child import die_with
from loop.trainers.progress import Channel

PROMPTS_A_REQUEST = 8
REQUESTS_AT_ONCE = 4


class Spec(BaseModel):
    """What `loop.lm_eval` asks for. `generated` and `ranked` map each task to the metric that is its score."""

    model_config = ConfigDict(extra="forbid")
    url: str
    served: list[str]
    generated: dict[str, str]  # asked in the chat template, as apps do
    ranked: dict[str, str]  # by log-probability of plain text: a third of the tokens, each of which costs a softmax
    tokenizer: Path
    include: Path
    max_length: int
    timeout_seconds: int
    out: Path  # one file a model: `<index>.json`, {task: [{id, score, prompt, answer}]}


class EvaluationFailed(NightschoolError):
    code = "evaluation_failed"
    default_hint = "The evaluation's log holds the traceback; most often vLLM refused or cut a request."


def main() -> int:
    parser = argparse.ArgumentParser(description="Evaluate served models on lm-eval tasks.")
    parser.add_argument("spec", type=Path)
    parser.add_argument("--parent", type=int)
    arguments = parser.parse_args()
    if arguments.parent is not None:
        die_with(arguments.parent)
    channel = Channel()
    try:
        run(Spec.model_validate_json(arguments.spec.read_bytes()))
    except Exception as error:  # noqa: BLE001 - the edge of the process: the parent gets a line, the log the traceback
        traceback.print_exc()
        channel.error(EvaluationFailed(f"lm-eval: {type(error).__name__}: {error}"[:2000]))
        return 1
    return 0


def run(spec: Spec) -> None:
    manager = TaskManager(include_path=str(spec.include), include_defaults=False)
    for index, served in enumerate(spec.served):
        rows = {
            **_evaluate(spec, served, spec.generated, manager, chat=True),
            **_evaluate(spec, served, spec.ranked, manager, chat=False),
        }
        write_durably(spec.out / f"{index}.json", canonical_json(rows))


def _evaluate(
    spec: Spec, served: str, metrics: dict[str, str], manager: TaskManager, *, chat: bool
) -> dict[str, list[dict[str, Any]]]:
    """The template is put on here and sent as tokens, over one endpoint for both kinds."""
    if not metrics:
        return {}
    result = simple_evaluate(
        model="local-completions",
        model_args={
            "model": served,
            "base_url": f"{spec.url}/v1/completions",
            "tokenizer": str(spec.tokenizer),
            "tokenizer_backend": "huggingface",
            "tokenized_requests": True,
            "num_concurrent": REQUESTS_AT_ONCE,
            "max_retries": 2,
            "max_length": spec.max_length,
            "timeout": spec.timeout_seconds,
        },
        tasks=list(metrics),
        task_manager=manager,
        batch_size=PROMPTS_A_REQUEST,
        apply_chat_template=chat,
        log_samples=True,
        bootstrap_iters=0,
        use_cache=None,
    )
    assert result is not None
    rows = {}
    for task, metric in metrics.items():
        samples, whole = result["samples"][task], result["n-samples"][task]["original"]
        if len(samples) != whole:
            raise ValueError(f"task {task} has {whole} items, but {len(samples)} were scored")
        rows[task] = _rows(samples, metric)
    return rows


def _rows(samples: list[dict[str, Any]], metric: str) -> list[dict[str, Any]]:
    """Under the documents' own ids, or, where these are not distinct, under their numbers."""
    rows = [_row(sample, metric) for sample in samples]
    if len({row["id"] for row in rows}) == len(rows):
        return rows
    return [{**row, "id": str(sample["doc_id"])} for row, sample in zip(rows, samples, strict=True)]


def _row(sample: dict[str, Any], metric: str) -> dict[str, Any]:
    if metric not in sample:
        given = sorted(key for key, value in sample.items() if isinstance(value, int | float) and key != "doc_id")
        raise KeyError(f"the task gives no metric {metric!r}; it gives {', '.join(given)}")
    doc = sample["doc"]
    score = float(sample[metric])
    return {
        "id": str(doc.get("id", sample["doc_id"])),
        "score": score if math.isfinite(score) else None,
        "prompt": str(doc.get("question", sample["arguments"][0][0])),
        "answer": _answer(sample),
    }


def _answer(sample: dict[str, Any]) -> str:
    """The generated text, or the choice of the highest log-probability."""
    first = sample["filtered_resps"][0]
    if isinstance(first, str):
        return first
    likelihoods = [float(response[0]) for response in sample["filtered_resps"]]
    return str(sample["arguments"][likelihoods.index(max(likelihoods))][1]).strip()


if __name__ == "__main__":
    sys.exit(main())
