"""Nightschool as an operator has it, over servers that run elsewhere: `up`, or `serve` and `work`; it may be killed."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx

from service.children import Child

PROJECT = "support-bot"
GENERAL = Path(__file__).parent.parent / "service" / "demo_company" / "general.jsonl"
SETTINGS = """
data_dir = "{data_dir}"
{database}
[http]
port = 0
[vllm]
managed = false
examination = "replica"
[[vllm.replicas]]
url = "{vllm}"
[label_studio]
managed = false
url = "{label_studio}"
token = "file:{token_file}"
[mlflow]
managed = false
url = "{mlflow}"
poll_seconds = 0.3
[[projects]]
name = "{project}"
base_dir = "{base_dir}"
base_name = "{base_name}"
min_labels = 4
[projects.schedule]
enabled = false
[projects.labeling]
held_out_share = 0.0
poll_seconds = 0.5
[projects.trainer]
quantisation = "none"
max_length = 128
save_steps = 10
{trainer}
[projects.replay]
base_rows = {base_rows}
[projects.gate]
margin_points = 50
alpha = 0.02
general_probes = {general_probes}
[projects.approval]
allow_unattributed = true
"""


@dataclass
class Up:
    """One installation: a settings file, a data folder, and the process that serves it, now and then.

    `apart`: `serve` and `work` instead of `up`.
    """

    settings: Path
    data_dir: Path
    label_studio_url: str
    label_studio_token: str
    mlflow_url: str
    project: str
    apart: bool = False
    child: Child | None = None
    worker: Child | None = None
    ready: dict[str, Any] = field(default_factory=dict)

    async def start(self) -> None:
        ready = self.data_dir / "state" / "ready.json"
        ready.unlink(missing_ok=True)
        self.child = self._process("serve" if self.apart else "up")

        async def is_ready() -> bool:
            return ready.exists()

        await self.child.wait_ready(is_ready, 120)
        self.ready = json.loads(ready.read_text(encoding="utf-8"))

        if self.apart:
            self.worker = self._process("work")

    def _process(self, command: str) -> Child:
        return Child.start(
            f"nightschool {command}",
            [sys.executable, "-m", "service.cli", command, "--settings", str(self.settings)],
            environment={},
            log_path=self.data_dir / f"{command}.log",
        )

    async def kill(self) -> None:
        """SIGKILL to Nightschool itself; its watchdog sees to what it leaves behind."""
        assert self.child is not None
        os.kill(self.ready["pid"], signal.SIGKILL)
        await self.child.ended()

    async def stop(self) -> None:
        for child in (self.worker, self.child):
            if child is not None:
                await child.stop()

    def client(self) -> httpx.AsyncClient:
        key = Path(self.ready["admin_key_file"]).read_text(encoding="utf-8").strip()
        return httpx.AsyncClient(
            base_url=self.ready["url"], headers={"Authorization": f"Bearer {key}"}, timeout=120, trust_env=False
        )

    async def call(self, method: str, path: str, body: dict[str, Any] | None = None) -> Any:
        async with self.client() as client:
            answer = await client.request(method, path, json=body)
        assert answer.is_success, f"{method} {path}: {answer.status_code} {answer.text}"
        return answer.json()

    async def status(self) -> dict[str, Any]:
        found: dict[str, Any] = await self.call("GET", f"/v1/projects/{self.project}")
        return found

    async def night(self, night_id: str) -> dict[str, Any]:
        found: dict[str, Any] = await self.call("GET", f"/v1/nights/{night_id}")
        return found

    async def claim(self, date: str, **recipe: Any) -> str:
        body = {"project": self.project, "date": date, "recipe": recipe}
        return str((await self.call("POST", "/v1/nights", body))["id"])

    async def wait_for(self, night_id: str, *states: str, seconds: float = 1800) -> dict[str, Any]:
        end = time.monotonic() + seconds
        while (night := await self.night(night_id))["state"] not in states:
            ended = {"FAILED", "SKIPPED", "REJECTED", "INCONCLUSIVE"} - set(states)
            assert night["state"] not in ended, f"{night['state']}: {night['reason']} {night['hint']}"
            assert time.monotonic() < end, f"still {night['state']}: {night['live']}"
            await asyncio.sleep(0.3)
        return night

    async def flag_and_label(self, corrections: dict[str, str]) -> None:
        """Question -> right answer: flagged self-contained, labelled through Label Studio's API, come back."""
        before = sum((await self.status())["labels"].values())
        async with self.client() as client:
            for question in corrections:
                body = {
                    "kind": "flag",
                    "messages": [{"role": "user", "content": question}],
                    "answer": "I do not know that.",
                    "project": self.project,
                }
                (await client.post("/v1/feedback", json=body)).raise_for_status()
        await self._until(lambda s: s["items"].get("pushed", 0) >= len(corrections))
        labelling_project = (await self.status())["labelling_project"]
        assert labelling_project is not None
        headers = {"Authorization": f"Token {self.label_studio_token}"}
        async with httpx.AsyncClient(base_url=self.label_studio_url, headers=headers, timeout=60) as people:
            await _label(people, labelling_project, corrections)
        await self._until(lambda s: sum(s["labels"].values()) >= before + len(corrections))

    async def rate_good_answers(self, count: int = 24) -> None:
        """General questions that the base answers well, asked through the gateway and rated up: they must stay good."""
        rows = [json.loads(line) for line in GENERAL.read_text(encoding="utf-8").splitlines()][:count]
        async with self.client() as client:
            await asyncio.gather(*(self._ask_and_rate(client, row) for row in rows))

    async def _ask_and_rate(self, client: httpx.AsyncClient, row: dict[str, Any]) -> None:
        message = {"role": "user", "content": row["question"]}
        body = {"model": self.project, "messages": [message], "max_tokens": 24, "temperature": 0}
        answer = (await client.post("/v1/chat/completions", json=body)).raise_for_status().json()
        rating = {"kind": "rating", "value": 1, "tags": {"must_contain": "|".join(row["accept"])}}
        rating |= {"exchange_id": answer["id"], "project": self.project}
        (await client.post("/v1/feedback", json=rating)).raise_for_status()

    async def _until(self, done: Any, seconds: float = 60) -> None:
        end = time.monotonic() + seconds
        while not done(status := await self.status()):
            assert time.monotonic() < end, status
            await asyncio.sleep(0.3)


async def _label(people: httpx.AsyncClient, project: int, corrections: dict[str, str]) -> None:
    while (offered := await people.get(f"/api/projects/{project}/next/")).status_code == 200:
        task = offered.json()
        answer = next(right for question, right in corrections.items() if question in task["data"]["conversation"])
        result = [
            {"from_name": "verdict", "to_name": "answer", "type": "choices", "value": {"choices": ["wrong"]}},
            {"from_name": "correction", "to_name": "answer", "type": "textarea", "value": {"text": [answer]}},
        ]
        made = await people.post(f"/api/tasks/{task['id']}/annotations/", json={"result": result})
        made.raise_for_status()


@asynccontextmanager
async def installed(
    folder: Path,
    *,
    vllm: Any,
    label_studio: Any,
    mlflow: Any,
    project: str = PROJECT,
    trainer: str = "",
    base_rows: int = 128,
    general_probes: bool = False,
    database_url: str = "",
) -> AsyncIterator[Up]:
    """Not started yet. The servers are the session's; the project's name keeps tests apart on them.

    With the URL of a PostgreSQL, `serve` and `work` run apart.
    """
    token_file = folder / "label-studio-token"
    token_file.write_text(label_studio.token, encoding="utf-8")
    data_dir = folder / "data"
    data_dir.mkdir()
    settings = folder / "nightschool.toml"
    settings.write_text(
        SETTINGS.format(
            data_dir=data_dir,
            database=f'[database]\nurl = "{database_url}"' if database_url else "",
            vllm=vllm.url,
            label_studio=label_studio.url,
            token_file=token_file,
            mlflow=mlflow.url,
            project=project,
            base_dir=vllm.base_dir,
            base_name=vllm.base_name,
            trainer=trainer,
            base_rows=base_rows,
            general_probes=str(general_probes).lower(),
        ),
        encoding="utf-8",
    )
    up = Up(settings, data_dir, label_studio.url, label_studio.token, mlflow.url, project, apart=bool(database_url))
    try:
        yield up
    finally:
        await up.stop()
