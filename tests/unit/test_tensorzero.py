"""POST /feedback takes what TensorZero's clients send, unchanged."""

from __future__ import annotations

import uuid
from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest

from labeling.database import Database
from labeling.exchanges import record
from labeling.settings import LabelingSettings, MetricSettings
from labeling.tables import Exchange, Feedback
from service.settings import Settings
from tests.running import PROJECT, Service, count, rows, service, settings_for

INFERENCE = "0197177a-7c00-7000-8000-000000000001"
METRICS = {
    "csat": MetricSettings(low=1, high=5, optimize="max"),
    "edits": MetricSettings(low=0, high=10, optimize="min"),
    "gave_up": MetricSettings(low=0, high=1, optimize="min"),
}


def settings() -> Settings:
    found = settings_for(["http://127.0.0.1:9"])
    (project,) = found.projects
    told = project.model_copy(update={"labeling": LabelingSettings(metrics=METRICS)})
    return found.model_copy(update={"projects": (told,)})


@pytest.fixture
async def running(database: Database) -> AsyncIterator[Service]:
    async with service(database, settings()) as found:
        yield found


@pytest.fixture
async def client(running: Service) -> AsyncIterator[httpx.AsyncClient]:
    async with await running.client("feedback") as found:
        yield found


def body(metric_name: str, value: Any, **more: Any) -> dict[str, Any]:
    return {"inference_id": INFERENCE, "metric_name": metric_name, "value": value, **more}


CALL = {"type": "tool_call", "name": "open", "arguments": {"door": 2}}
CALLED = {"type": "function", "function": {"name": "open", "arguments": '{"door": 2}'}}


@pytest.mark.parametrize(
    ("metric", "value", "kind", "stored"),
    [
        ("draft_accepted", True, "rating", True),
        ("quality", 0.25, "rating", 0.25),
        ("csat", 4, "rating", 0.75),
        ("edits", 2.5, "rating", 0.75),
        ("gave_up", True, "rating", False),
        ("comment", "Too long.", "comment", None),
        ("demonstration", "Door 2.", "correction", "Door 2."),
        ("demonstration", [{"type": "text", "text": "Door 2."}], "correction", "Door 2."),
        ("demonstration", [CALL], "correction", {"role": "assistant", "content": None, "tool_calls": [CALLED]}),
        ("demonstration", {"door": 2}, "correction", {"door": 2}),
    ],
)
async def test_each_metric(
    running: Service, client: httpx.AsyncClient, metric: str, value: Any, kind: str, stored: Any
) -> None:
    """Boolean and float metrics, comments and demonstrations; the answer is a UUID by which it is found again."""
    answer = await client.post("/feedback", json=body(metric, value, tags={"user": "1"}))
    assert answer.status_code == 200, answer.text
    assert set(answer.json()) == {"feedback_id"}
    named = uuid.UUID(answer.json()["feedback_id"])
    assert named.version == 7
    (row,) = await rows(running.database, Feedback)
    assert (row.id, row.kind, row.value, row.completion_id) == (f"fb_{named.hex}", kind, stored, INFERENCE)
    assert row.comment == (value if kind == "comment" else None)
    assert row.tags == {"user": "1", "tensorzero::metric_name": metric}
    assert (await client.get(f"/v1/feedback/{named}")).json()["id"] == row.id


async def test_targets(running: Service, client: httpx.AsyncClient) -> None:
    """An inference is an exchange, known or not yet, and however its UUID is spelled; an episode is a session."""
    known = Exchange(
        project=PROJECT, completion_id=INFERENCE, served="base", messages=[], parameters={}, answers=["Said"]
    )
    async with running.database.write() as session:
        await record(session, [known])
    spelled = body("ok", False, inference_id=INFERENCE.replace("-", "").upper())
    episode = {"episode_id": INFERENCE, "metric_name": "ok", "value": True}
    ours = body("ok", True, inference_id="chatcmpl-5f")
    for sent in (spelled, episode, ours):
        assert (await client.post("/feedback", json=sent)).status_code == 200
    found = {(row.completion_id, row.session_id, row.exchange_id) for row in await rows(running.database, Feedback)}
    assert found == {(INFERENCE, None, known.id), (None, INFERENCE, None), ("chatcmpl-5f", None, None)}


WRONG: list[Any] = [
    {"metric_name": "ok", "value": True},
    body("ok", True, episode_id=INFERENCE),
    body("", True),
    {"inference_id": INFERENCE, "metric_name": "ok"},
    {"inference_id": INFERENCE, "value": True},
    {"episode_id": INFERENCE, "metric_name": "demonstration", "value": "a"},
    body("ok", "good"),
    body("ok", 7),
    body("csat", 9),
    body("comment", 1),
    body("demonstration", [{"type": "image"}]),
    body("demonstration", [{"type": "tool_call", "arguments": {}}]),
    body("demonstration", 3),
    body("ok", True, unknown=1),
    body("ok", True, tags={"tensorzero::x": "1"}),
    body("ok", True, tags={"x": 1}),
    body("ok", True, dryrun="yes"),
    [body("ok", True)],
]


async def test_mistakes(running: Service, client: httpx.AsyncClient) -> None:
    """400 with one `error`, as TensorZero says it; nothing is stored."""
    for sent in WRONG:
        answer = await client.post("/feedback", json=sent)
        assert (answer.status_code, list(answer.json())) == (400, ["error"]), sent
    assert "[projects.labeling.metrics.ok]" in (await client.post("/feedback", json=body("ok", 7))).json()["error"]
    assert (await client.post("/feedback", content=b"{")).status_code == 400
    assert (await client.post("/feedback", json=body("ok", True), headers={"Authorization": ""})).status_code == 401
    assert await count(running.database, Feedback) == 0


async def test_dry_run_and_keys(running: Service, client: httpx.AsyncClient) -> None:
    """`dryrun` answers the same and stores nothing; an Idempotency-Key holds here too."""
    assert "feedback_id" in (await client.post("/feedback", json=body("ok", True, dryrun=True))).json()
    assert await count(running.database, Feedback) == 0
    sent: dict[str, Any] = {"json": body("ok", True, dryrun=False), "headers": {"Idempotency-Key": "k"}}
    first, again = [(await client.post("/feedback", **sent)).json() for _ in range(2)]
    assert first == again
    assert await count(running.database, Feedback) == 1
