"""The base's own good answers to general prompts, as training rows against forgetting (self-distillation).

Asked once of a replica's base, in the prompts' order and only as far as nights need them; kept in the data directory
under the digests of base and prompts.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from labeling.errors import InvalidInput
from loop.digests import digest_file, digest_json, read_jsonl, write_jsonl
from loop.settings import ReplaySettings
from loop.vllm import Replica

OURS = Path(__file__).parent / "replay_prompts" / "general.jsonl"
CONCURRENCY = 32
BATCH = 96


class BadPromptsFile(InvalidInput):
    code = "bad_prompts_file"
    default_hint = 'Each line must be a JSON object with a text "prompt".'


async def base_answers(
    replica: Replica,
    base_name: str,
    base_digest: str,
    settings: ReplaySettings,
    data_dir: Path,
    *,
    whole: bool = True,
    wanted: int = 1_000_000,
) -> list[tuple[str, str]]:
    """Up to `base_rows`, and no more than `wanted`, pairs of prompt and the base's greedy answer; none is empty.

    `whole`: cut-off ones too, for cross entropy would teach the model to stop there. A KL term holds the base's own
    doubt about stopping, so that the beginning of an answer does.
    """
    wanted = min(settings.base_rows, wanted)
    if wanted == 0:
        return []
    source = settings.prompts_file or OURS
    prompts = _prompts(source)
    key = digest_json([base_digest, digest_file(source), settings.base_answer_tokens])
    kept = data_dir / "cache" / "base_answers" / f"{key.removeprefix('sha256:')[:32]}.jsonl"
    asked = read_jsonl(kept) if kept.exists() else []
    while len(rows := _fit(asked, whole)) < wanted and len(asked) < len(prompts):
        asked += await _ask(replica, base_name, prompts[len(asked) : len(asked) + BATCH], settings.base_answer_tokens)
        kept.parent.mkdir(parents=True, exist_ok=True)
        write_jsonl(kept, asked)
    return rows[:wanted]


def _fit(asked: list[dict[str, Any]], whole: bool) -> list[tuple[str, str]]:
    return [(row["prompt"], row["answer"]) for row in asked if row["answer"].strip() and (row["finished"] or not whole)]


async def _ask(replica: Replica, base_name: str, prompts: list[str], tokens: int) -> list[dict[str, Any]]:
    answers = await replica.ask_many(
        base_name,
        [[{"role": "user", "content": prompt}] for prompt in prompts],
        max_tokens=tokens,
        concurrency=CONCURRENCY,
    )
    return [
        {"prompt": prompt, "answer": answer.text, "finished": answer.finish_reason == "stop"}
        for prompt, answer in zip(prompts, answers, strict=True)
    ]


def _prompts(path: Path) -> list[str]:
    try:
        return [str(row["prompt"]) for row in read_jsonl(path)]
    except OSError as error:
        raise BadPromptsFile(f"cannot read {path}: {error.strerror}") from error
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise BadPromptsFile(f"{path} is not a list of prompts: {error}") from error
