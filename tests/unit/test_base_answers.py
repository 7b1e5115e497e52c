"""The base's answers that hold it: asked for once, only as far as they are needed."""

from __future__ import annotations

from pathlib import Path

from loop.base_answers import BATCH, base_answers
from loop.digests import write_jsonl
from loop.settings import ReplaySettings
from loop.vllm import Replica
from tests.fakes.vllm import FakeVllm


async def test_only_what_is_needed_is_asked_for_and_only_once(tmp_path: Path) -> None:
    """A later night that needs more asks for the rest; one that needs fewer gets the first ones."""
    prompts = [f"What is {number}?" for number in range(3 * BATCH)]
    write_jsonl(tmp_path / "prompts.jsonl", [{"prompt": prompt} for prompt in prompts])
    settings = ReplaySettings(prompts_file=tmp_path / "prompts.jsonl", base_rows=2 * BATCH)
    async with FakeVllm(base="base") as fake:
        replica = Replica(fake.url)

        async def answers(wanted: int, digest: str = "d") -> list[str]:
            rows = await base_answers(replica, "base", digest, settings, tmp_path, whole=False, wanted=wanted)
            return [prompt for prompt, _ in rows]

        asked = []
        for wanted in (0, 5, BATCH + 1, 3, 10 * BATCH):
            found = await answers(wanted)
            assert found == prompts[: min(wanted, 2 * BATCH)]
            asked.append(len(fake.seen))
        assert await answers(2, "another base") == prompts[:2]
        assert len(fake.seen) == asked[-1] + BATCH
        await replica.close()
    assert asked == [0, BATCH, 2 * BATCH, 2 * BATCH, 2 * BATCH]
