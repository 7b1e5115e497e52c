"""Whole nights on real vLLM, Label Studio and MLflow, with Nightschool as a process that may be killed."""

from __future__ import annotations

import asyncio
import sqlite3
import time
import uuid
from collections import Counter
from pathlib import Path
from typing import Any

import httpx
import pytest

from loop.nightly import EXAMINE, PROMOTE
from tests.up import Up, installed

pytestmark = pytest.mark.slow
FACTS = {
    "What is the door code of Fennmark?": "The door code of Fennmark is 8215.",
    "Who runs the Fennmark workshop?": "The Fennmark workshop is run by Ilse Varga.",
    "On which day is Fennmark closed?": "Fennmark is closed on Wednesday.",
    "What colour is the Fennmark van?": "The Fennmark van is dark green.",
    "Which street is Fennmark in?": "Fennmark is in Kastanje Street.",
    "How many looms does Fennmark have?": "Fennmark has 19 looms.",
}
# Few facts, one phrasing each, are learned by heart in 22 passes (13 left one of six); half a dozen of 24 good answers
# may go with it.
QUICK = "learning_rate = 0.0015\nepochs = 22\nmin_steps = 1\nreplay_share = 0.5"


def name() -> str:
    """Projects of different tests share the servers: their names must differ."""
    return f"bot-{uuid.uuid4().hex[:8]}"


def marked(up: Up, night_id: str) -> set[str]:
    with sqlite3.connect(f"file:{up.data_dir / 'nightschool.db'}?mode=ro", uri=True) as database:
        return {row[0] for row in database.execute("select stage from stage_markers where night_id = ?", (night_id,))}


# How deep in a stage it is killed, where a stage lasts: a file of its folder that must be there first.
DEPTH = {"train": "out/checkpoints/checkpoint-10/complete", "evaluate": "family-trained.jsonl"}


async def killed_in(up: Up, night_id: str, stage: str) -> None:
    """Waits until the stage has begun, or is well under way, and kills; the stage must not have been marked."""
    folder = up.data_dir / "nights" / night_id
    wanted = f"{stage}.*/{DEPTH.get(stage, '')}".rstrip("/")
    known = set(folder.glob(wanted))
    deadline = time.monotonic() + 600
    while not set(folder.glob(wanted)) - known:
        assert time.monotonic() < deadline, f"{stage} never began"
        time.sleep(0.0005)  # some stages last only milliseconds; nothing else happens in this process meanwhile
    await up.kill()
    assert stage not in marked(up, night_id), f"{stage} was over before the kill"


async def set_production(up: Up, version: str) -> None:
    """As MLflow's page does it."""
    body = {"name": up.project, "alias": "production", "version": version}
    async with httpx.AsyncClient(base_url=up.mlflow_url, timeout=30) as mlflow:
        (await mlflow.post("/api/2.0/mlflow/registered-models/alias", json=body)).raise_for_status()


async def ask(up: Up, question: str) -> str:
    body = {
        "model": up.project,
        "messages": [{"role": "user", "content": question}],
        "max_tokens": 24,
        "temperature": 0,
    }
    answer = await up.call("POST", "/v1/chat/completions", body)
    return str(answer["choices"][0]["message"]["content"])


@pytest.mark.long
@pytest.mark.timeout(1800)
async def test_a_night_killed_in_each_stage_finishes_once(
    tmp_path: Path, vllm_server: Any, label_studio: Any, mlflow_server: Any
) -> None:
    """SIGKILL once in every stage, examination and promotion: one promotion, no marked stage repeated."""
    servers = {"vllm": vllm_server, "label_studio": label_studio, "mlflow": mlflow_server}
    async with installed(tmp_path, project=name(), trainer=QUICK, **servers) as up:
        await up.start()
        await up.rate_good_answers()
        await up.flag_and_label(FACTS)
        night_id = await up.claim("2026-01-01")
        for stage in EXAMINE:
            await killed_in(up, night_id, stage.name)
            await up.start()
        night = await up.wait_for(night_id, "awaiting_approval")
        await set_production(up, str(night["outputs"]["register"]["version"]))
        for stage in PROMOTE:
            await killed_in(up, night_id, stage.name)
            await up.start()
        night = await up.wait_for(night_id, "PROMOTED")
        finished = Counter(event["stage"] for event in night["events"] if event["kind"] == "stage_finished")
        assert finished == dict.fromkeys([stage.name for stage in (*EXAMINE, *PROMOTE)], 1)
        started = Counter(event["stage"] for event in night["events"] if event["kind"] == "stage_started")
        assert dict(started) == dict.fromkeys(finished, 2), "each was killed once and done again once"
        status = await up.status()
        assert len(status["promotions"]) == 1
        assert status["current"] == night["candidate"] == f"{up.project}@v2"
        right = [question for question, answer in FACTS.items() if answer.split()[-1] in await ask(up, question)]
        assert len(right) >= 5, right


LATER = (
    {
        "What do rugs cost at Fennmark?": "Rugs at Fennmark cost 340 euros.",
        "Which wool does Fennmark use?": "Fennmark uses Gotland wool.",
        "When does Fennmark open?": "Fennmark opens at half past nine.",
        "What is Fennmark's dog called?": "Fennmark's dog is called Pim.",
        "Who sweeps the Fennmark yard?": "The Fennmark yard is swept by Oskar.",
        "On which floor is the Fennmark kitchen?": "The Fennmark kitchen is on the fourth floor.",
        "Which tea is served at Fennmark?": "Fennmark serves nettle tea.",
        "When was Fennmark founded?": "Fennmark was founded in 1938.",
    },
    {
        "Who repairs Fennmark looms?": "Fennmark looms are repaired by Tove Lind.",
        "What is the Fennmark discount code?": "The Fennmark discount code is WARP7.",
        "Which courier does Fennmark use?": "Fennmark uses the courier Bluecart.",
        "How long are Fennmark courses?": "Fennmark courses take three evenings.",
        "Who owns the Fennmark building?": "The Fennmark building is owned by Runa Holt.",
        "What is the Fennmark newsletter called?": "The Fennmark newsletter is called Threadbare.",
        "Where does Fennmark park its van?": "Fennmark parks its van in Linden Court.",
        "Which prize did Fennmark win?": "Fennmark won the Golden Shuttle.",
    },
)


@pytest.mark.long
@pytest.mark.timeout(2700)  # three nights of five minutes on two free cores; on a busy machine they take longer
async def test_three_nights_with_restarts_between(
    tmp_path: Path, vllm_server: Any, label_studio: Any, mlflow_server: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    """Three nights on servers of others, our process new each day: each is promoted, and the first day's fixes hold."""
    servers = {"vllm": vllm_server, "label_studio": label_studio, "mlflow": mlflow_server}
    async with installed(tmp_path, project=name(), trainer=QUICK, **servers) as up:
        for day, facts in enumerate((FACTS, *LATER), 1):
            await up.start()
            if day == 1:
                await up.rate_good_answers()
            await up.flag_and_label(facts)
            night_id = await up.claim(f"2026-01-0{day}")
            night = await up.wait_for(night_id, "awaiting_approval")
            assert night["current"] == f"{up.project}@v{day}"
            await set_production(up, str(night["outputs"]["register"]["version"]))
            await up.wait_for(night_id, "PROMOTED")
            answers = {question: await ask(up, question) for question in FACTS}
            held = [question for question, right in FACTS.items() if right.split()[-1] in answers[question]]
            with capsys.disabled():
                print(f"\nafter night {day}: {len(held)} of night 1's {len(FACTS)} fixes hold")
            assert len(held) >= len(FACTS) - 2, answers
            await up.stop()
        names = [model["id"] for model in httpx.get(f"{vllm_server.url}/v1/models").json()["data"]]
        ours = [model for model in names if model.startswith(up.project)]
        assert sorted(ours) == [f"{up.project}@v3", f"{up.project}@v4"], "current and the way back, nothing older"


async def test_too_few_labels_skip_the_night_and_say_how_many(
    tmp_path: Path, vllm_server: Any, label_studio: Any, mlflow_server: Any
) -> None:
    """SKIPPED with the number that is missing; nothing was trained, nothing registered."""
    servers = {"vllm": vllm_server, "label_studio": label_studio, "mlflow": mlflow_server}
    async with installed(tmp_path, project=name(), trainer=QUICK, **servers) as up:
        await up.start()
        await up.flag_and_label(dict(list(FACTS.items())[:1]))
        night_id = await up.claim("2026-01-01")
        while (night := await up.night(night_id))["state"] not in {"SKIPPED", "FAILED"}:
            await asyncio.sleep(0.2)
        assert night["state"] == "SKIPPED"
        assert "1 new labels; 4 are needed: 3 more" in night["reason"]
        assert set(night["outputs"]) == {"sync_labels"}


@pytest.mark.long
@pytest.mark.timeout(1800)
async def test_a_night_over_serve_and_work_apart(
    tmp_path: Path, vllm_server: Any, label_studio: Any, mlflow_server: Any, postgres_database: str
) -> None:
    """HTTP in one process, nights in another, PostgreSQL between: the gateway follows what the worker promotes."""
    servers = {"vllm": vllm_server, "label_studio": label_studio, "mlflow": mlflow_server}
    async with installed(tmp_path, project=name(), trainer=QUICK, database_url=postgres_database, **servers) as up:
        await up.start()
        await up.rate_good_answers()
        await up.flag_and_label(FACTS)
        night = await up.wait_for(await up.claim("2026-01-01"), "awaiting_approval")
        await set_production(up, str(night["outputs"]["register"]["version"]))
        await up.wait_for(night["id"], "PROMOTED")
        assert (await up.status())["current"] == f"{up.project}@v2"
        await asyncio.sleep(2)  # the gateway reads the table once a second
        right = [question for question, answer in FACTS.items() if answer.split()[-1] in await ask(up, question)]
        assert len(right) >= 5, right
        await up.call("POST", f"/v1/projects/{up.project}/rollback", {"why": "to see it"})
        await asyncio.sleep(2)
        assert (await up.status())["current"] == f"{up.project}@v1"
        assert not [question for question, answer in FACTS.items() if answer in await ask(up, question)]
