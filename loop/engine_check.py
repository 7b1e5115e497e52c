"""Two checks of a running engine for the silent failures that its health endpoint does not see.

Called after each load, at the start and by `nightschool doctor`.
"""

from __future__ import annotations

import asyncio
from typing import ClassVar

from labeling.errors import Unavailable
from loop.probe import difference
from loop.vllm import Message, Replica

GREETING: list[Message] = [{"role": "user", "content": "What is the capital of France?"}]
STORY: list[Message] = [{"role": "user", "content": "Tell me a long story about a lighthouse."}]
SENTENCE = "The capital of France is Paris, and it lies on the Seine."
CANARY_TOKENS = 8
STORY_TOKENS = 48
MIXED_LOOKS = 4
MIXED_TOLERANCE = 0.05  # nats a token; the wrong slot's weights moved 0.18 and more, batching nothing on CPU


class EngineIll(Unavailable):
    """Answers 200, and wrongly; only a restart heals it."""

    code: ClassVar[str] = "engine_ill"
    default_hint = "Restart that vLLM; adapters are loaded again by themselves."


async def canary(replica: Replica, base_name: str) -> None:
    """After one request to an adapter with NaN, vLLM answers every model with empty text until it is restarted."""
    answer = await replica.ask(base_name, GREETING, max_tokens=CANARY_TOKENS)
    if not answer.text.strip():
        raise EngineIll(f"{base_name} at {replica.url} answers with empty text")


async def base_stays_base(replica: Replica, base_name: str, adapter: str) -> float:
    """The base's log-probabilities must not move while an adapter's request runs in the same batch; gives by how much.

    On CPU an unpatched vLLM answers the base's rows with the last slot's weights once that slot was ever filled.
    """
    alone = await replica.log_probabilities(base_name, SENTENCE)
    story = asyncio.create_task(replica.ask(adapter, STORY, max_tokens=STORY_TOKENS))
    try:
        looks = [await replica.log_probabilities(base_name, SENTENCE) for _ in range(MIXED_LOOKS)]
    finally:
        story.cancel()
        await asyncio.gather(story, return_exceptions=True)
    off = max(difference([alone], [look]) for look in looks)
    if off > MIXED_TOLERANCE:
        raise EngineIll(
            f"{base_name} at {replica.url} changes by {off:.3f} nats a token when {adapter} answers beside it",
            hint="Start that vLLM on CPU with --worker-extension-cls loop.vllm_cpu_worker.BaseRows.",
        )
    return off
