"""Whole nights by another method, and on top of the adapter that serves, on real vLLM, Label Studio and MLflow."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.integration.test_night import FACTS, LATER, QUICK, name, set_production
from tests.up import installed


@pytest.mark.long
@pytest.mark.timeout(2700)  # three nights; on a busy machine the waits below may be used up
async def test_a_night_of_two_steps_and_one_on_top_of_it(
    tmp_path: Path, vllm_server: Any, label_studio: Any, mlflow_server: Any
) -> None:
    """sft before dpo is promoted; the next night goes on from its adapter; another rank is refused before it trains."""
    servers = {"vllm": vllm_server, "label_studio": label_studio, "mlflow": mlflow_server}
    async with installed(tmp_path, project=name(), trainer=QUICK, **servers) as up:
        await up.start()
        await up.rate_good_answers()
        await up.flag_and_label(FACTS)
        first = await up.claim("2026-01-01", method="sft+dpo", epochs=14)
        night = await up.wait_for(first, "awaiting_approval", seconds=1500)
        assert (night["outputs"]["build_delta"]["method"], night["outputs"]["build_delta"]["pairs"]) == ("sft+dpo", 6)
        assert night["outputs"]["train"]["result"]["final_margin"] > 5
        assert "6 pairs of a better and a worse answer; at the end the better one lay" in night["report"]
        await set_production(up, str(night["outputs"]["register"]["version"]))
        await up.wait_for(first, "PROMOTED")
        await up.flag_and_label(LATER[0])
        night = await up.wait_for(await up.claim("2026-01-02", start="current"), "awaiting_approval", seconds=1500)
        assert night["outputs"]["build_delta"]["method"] == "sft"
        assert night["outputs"]["train"]["result"]["start"] == f"{up.project}@v2"
        assert "8 corrections and 6 older labels say what is right" in night["report"]
        night = await up.wait_for(await up.claim("2026-01-03", start="current", rank=8, alpha=32), "FAILED")
        assert "rank 16 there, 8 here" in night["reason"]
        assert "train" not in night["outputs"]
