"""The base's own good answers to general prompts, as training rows against forgetting (self-distillation).

Asked once of a replica's base, kept in the data directory under the digests of base and prompts.
"""

from __future__ import annotations

import json
from pathlib import Path

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
    replica: Replica, base_name: str, base_digest: str, settings: ReplaySettings, data_dir: Path, *, whole: bool = True
) -> list[tuple[str, str]]:
    """Up to `base_rows` pairs of prompt and the base's greedy answer; empty answers are left out.

    `whole`: cut-off ones too, for cross entropy would teach the model to stop there. A KL term holds the base's own
    doubt about stopping, so that the beginning of an answer does.
    """
    if settings.base_rows == 0:
        return []
    source = settings.prompts_file or OURS
    prompts = _prompts(source)
    key = digest_json([base_digest, digest_file(source), settings.base_answer_tokens, settings.base_rows, whole])
    kept = data_dir / "cache" / "base_answers" / f"{key.removeprefix('sha256:')[:32]}.jsonl"
    if not kept.exists():
        kept.parent.mkdir(parents=True, exist_ok=True)
        write_jsonl(kept, await _ask(replica, base_name, prompts, settings, whole))
    return [(row["prompt"], row["answer"]) for row in read_jsonl(kept)]


async def _ask(
    replica: Replica, base_name: str, prompts: list[str], settings: ReplaySettings, whole: bool
) -> list[dict[str, str]]:
    """In the prompts' order, a batch at a time, until there are enough answers."""
    rows: list[dict[str, str]] = []
    for start in range(0, len(prompts), BATCH):
        batch = prompts[start : start + BATCH]
        answers = await replica.ask_many(
            base_name,
            [[{"role": "user", "content": prompt}] for prompt in batch],
            max_tokens=settings.base_answer_tokens,
            concurrency=CONCURRENCY,
        )
        rows += [
            {"prompt": prompt, "answer": answer.text}
            for prompt, answer in zip(batch, answers, strict=True)
            if answer.text.strip() and (answer.finish_reason == "stop" or not whole)
        ]
        if len(rows) >= settings.base_rows:
            break
    return rows[: settings.base_rows]


def _prompts(path: Path) -> list[str]:
    try:
        return [str(row["prompt"]) for row in read_jsonl(path)]
    except OSError as error:
        raise BadPromptsFile(f"cannot read {path}: {error.strerror}") from error
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise BadPromptsFile(f"{path} is not a list of prompts: {error}") from error
