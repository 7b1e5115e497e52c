"""The three doors as the demo's people use them: Nightschool's HTTP API, Label Studio's API, MLflow's API."""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass
from typing import Any

import httpx

from labeling.errors import Unavailable
from service.demo.company import Question


class DemoBroke(Unavailable):
    code = "demo_broke"
    default_hint = "The log files are in the demo's data folder, under logs/."


@dataclass
class Nightschool:
    """What the operator's scripts and the app call."""

    client: httpx.AsyncClient

    @classmethod
    def at(cls, url: str, key: str) -> Nightschool:
        headers = {"Authorization": f"Bearer {key}"}
        return cls(httpx.AsyncClient(base_url=url, headers=headers, timeout=60))

    async def call(self, method: str, path: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
        answer = await self.client.request(method, path, json=body)
        if answer.is_error:
            raise DemoBroke(f"{method} {path} answered {answer.status_code}: {answer.text[:400]}")
        result: dict[str, Any] = answer.json()
        return result

    async def wait_for_project(self, project: str, done: Any, seconds: float) -> dict[str, Any]:
        """Until `done(status)`; the status is GET /v1/projects/{project}."""
        end = time.monotonic() + seconds
        while True:
            status = await self.call("GET", f"/v1/projects/{project}")
            if done(status):
                return status
            if time.monotonic() > end:
                raise DemoBroke(f"after {seconds:.0f} s the project still stands at {status}")
            await asyncio.sleep(0.5)


@dataclass
class Labellers:
    """People at Label Studio's screen: they take the task that it offers next, and submit."""

    client: httpx.AsyncClient
    project: int

    @classmethod
    def at(cls, url: str, token: str, project: int) -> Labellers:
        return cls(httpx.AsyncClient(base_url=url, headers={"Authorization": f"Token {token}"}, timeout=60), project)

    async def label_all(self, known: dict[str, Question], progress: Any) -> int:
        """Answers every task offered, looked up by the question that it shows; returns how many."""
        done = 0
        while True:
            offered = await self.client.get(f"/api/projects/{self.project}/next/")
            if offered.status_code == 404:
                return done
            offered.raise_for_status()
            task = offered.json()
            await self._submit(task["id"], _question_of(task["data"], known))
            done += 1
            progress(done)

    async def _submit(self, task_id: int, question: Question) -> None:
        result = [_choice("verdict", "wrong"), _text("correction", question.answer)]
        if question.is_right(question.answer):
            result.append(_text("must_contain", question.must_contain))
        answer = await self.client.post(f"/api/tasks/{task_id}/annotations/", json={"result": result, "lead_time": 4.0})
        answer.raise_for_status()


def _question_of(data: dict[str, Any], known: dict[str, Question]) -> Question:
    shown = str(data["conversation"])
    matches = [question for text, question in known.items() if text in shown]
    if not matches:
        raise DemoBroke(f"no labeller knows an answer to {shown[:200]!r}")
    return max(matches, key=lambda question: len(question.text))


def _choice(name: str, value: str) -> dict[str, Any]:
    return {"from_name": name, "to_name": "answer", "type": "choices", "value": {"choices": [value]}}


def _text(name: str, value: str) -> dict[str, Any]:
    return {"from_name": name, "to_name": "answer", "type": "textarea", "value": {"text": [value]}}


@dataclass
class OnCall:
    """Whoever looks at the candidate in MLflow and moves the alias, as the UI's button does."""

    client: httpx.AsyncClient

    @classmethod
    def at(cls, url: str) -> OnCall:
        return cls(httpx.AsyncClient(base_url=url, timeout=60))

    async def aliases(self, project: str) -> dict[str, str]:
        answer = await self.client.get("/api/2.0/mlflow/registered-models/get", params={"name": project})
        answer.raise_for_status()
        return {row["alias"]: row["version"] for row in answer.json()["registered_model"].get("aliases", [])}

    async def promote(self, project: str, version: str) -> None:
        body = {"name": project, "alias": "production", "version": version}
        answer = await self.client.post("/api/2.0/mlflow/registered-models/alias", json=body)
        answer.raise_for_status()
