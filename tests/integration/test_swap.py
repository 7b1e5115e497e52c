"""Requests stream through the gateway across promote and roll back: none fails, none is answered by two models."""

from __future__ import annotations

import asyncio
import json
import secrets
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import pytest

from labeling.database import Database
from labeling.tables import Exchange
from loop import promotion
from loop.tables import NightState
from service.settings import Settings
from tests.fakes.vllm import FakeVllm, Faults
from tests.promoting import Company, close, found_company, tiny_base
from tests.running import Service, eventually, rows, service

QUESTION = "Tell me about pumps."
TOKENS = 12
CLIENTS = 3
PATIENCE_SECONDS = 240.0


@dataclass
class Answer:
    exchange: str
    text: str
    started: float
    ended: float


@dataclass
class Traffic:
    """Clients that ask again and again, streaming, until told to stop."""

    http: httpx.AsyncClient
    model: str
    answers: list[Answer] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)
    stopping: bool = False

    async def run(self) -> None:
        while not self.stopping:
            started = time.monotonic()
            try:
                exchange, text = await self._ask()
                self.answers.append(Answer(exchange, text, started, time.monotonic()))
            except (httpx.HTTPError, AssertionError) as error:
                self.failed.append(repr(error))

    async def _ask(self) -> tuple[str, str]:
        body = {"model": self.model, "messages": [{"role": "user", "content": QUESTION}], "stream": True}
        limits = {"max_tokens": TOKENS, "temperature": 0}
        async with self.http.stream("POST", "/v1/chat/completions", json={**body, **limits}) as response:
            lines = [line async for line in response.aiter_lines() if line]
        assert response.status_code == 200, lines
        assert lines[-1] == "data: [DONE]", lines
        events = [json.loads(line.removeprefix("data: ")) for line in lines[:-1]]
        assert len({event["id"] for event in events}) == 1
        return events[0]["id"], "".join(event["choices"][0]["delta"].get("content") or "" for event in events)

    async def more(self, count: int) -> None:
        """Waits for that many answers to requests that begin from now on."""
        since = time.monotonic()
        await eventually(lambda: sum(a.started > since for a in self.answers) >= count, PATIENCE_SECONDS)


@dataclass
class Town:
    company: Company
    service: Service


@pytest.fixture
async def database(tmp_path: Path) -> AsyncIterator[Database]:
    opened = Database(f"sqlite+aiosqlite:///{tmp_path}/test.db")
    await opened.create_tables()
    yield opened
    await opened.close()


@pytest.fixture(params=["fake", "real"])
def server(request: pytest.FixtureRequest) -> Any:
    """None for the fakes. Not async: the real one's start needs an event loop of its own."""
    return request.getfixturevalue("vllm_server") if request.param == "real" else None


@pytest.fixture
async def town(server: Any, database: Database, mlflow_server: Any, tmp_path: Path) -> AsyncIterator[Town]:
    """Two fake engines that name their model in each word, or the one real engine."""
    if server is not None:
        async with founded(database, mlflow_server.url, [server.url], tmp_path, server.base_dir, server.base_name) as t:
            yield t
        return
    faults = Faults(chunk_seconds=0.02)
    engines = [FakeVllm(faults=faults, answer=lambda model, _: " ".join([model] * TOKENS)) for _ in range(2)]
    async with engines[0], engines[1]:
        urls, base_dir = [engine.url for engine in engines], tiny_base(tmp_path / "base")
        async with founded(database, mlflow_server.url, urls, tmp_path, base_dir, "base") as t:
            yield t


@asynccontextmanager
async def founded(
    database: Database, mlflow_url: str, urls: list[str], folder: Path, base_dir: Path, base_name: str
) -> AsyncIterator[Town]:
    name = f"bot-{secrets.token_hex(4)}"
    project = {"name": name, "base_dir": base_dir, "base_name": base_name}
    replicas = [{"url": url} for url in urls]
    settings = Settings.model_validate({"data_dir": folder, "vllm": {"replicas": replicas}, "projects": [project]})
    async with service(database, settings) as running:
        company = await found_company(
            database,
            mlflow_url,
            urls,
            folder,
            base_dir=base_dir,
            base_name=base_name,
            aliases=running.state.aliases,
            name=name,
        )
        company.adapter = {"rank": 16, "size": 0.04} if base_name != "base" else {}
        yield Town(company, running)
        for replica in company.clients.replicas:
            for model in await replica.served_models():
                if model.parent is not None:
                    await replica.unload(model.name)
        await close(company)


async def test_no_request_fails_across_promote_and_roll_back(town: Town) -> None:
    """Each answer is whole and one model's own; after the switch new requests get the new one, after the roll back
    the old one again."""
    company = town.company
    night_id = await company.examined()
    own = await own_answers(company, [company.project.base_name, company.name(2)])
    assert len(set(own.values())) == 2, "the two models must answer differently for this test to see anything"
    key = await town.service.key("inference", project=company.project.name)
    headers = {"Authorization": f"Bearer {key}"}
    async with httpx.AsyncClient(base_url=town.service.url, headers=headers, timeout=300, trust_env=False) as http:
        traffic = Traffic(http, company.project.name)
        clients = [asyncio.create_task(traffic.run()) for _ in range(CLIENTS)]
        await traffic.more(CLIENTS)
        assert await company.promote(night_id) == NightState.PROMOTED, await company.night(night_id)
        promoted = time.monotonic()
        await traffic.more(CLIENTS)
        going_back = time.monotonic()
        await promotion.roll_back(company.clients, company.project, by="ada", why="to see it")
        back = time.monotonic()
        await traffic.more(CLIENTS)
        traffic.stopping = True
        await asyncio.gather(*clients)
    assert traffic.failed == []
    served = await served_by(town.service, len(traffic.answers))
    assert all(answer.text == own[served[answer.exchange]] for answer in traffic.answers)
    between = {served[a.exchange] for a in traffic.answers if promoted < a.started < going_back}
    after = {served[a.exchange] for a in traffic.answers if a.started > back}
    assert (between, after) == ({company.name(2)}, {company.project.base_name})
    print(f"{len(traffic.answers)} requests, 0 failed; roll back {back - going_back:.2f} s")


async def own_answers(company: Company, models: list[str]) -> dict[str, str]:
    """What each model says by itself."""
    replica = company.clients.replicas[0]
    asked = [{"role": "user", "content": QUESTION}]
    return {model: (await replica.ask(model, asked, max_tokens=TOKENS)).text for model in models}


async def served_by(running: Service, expected: int) -> dict[str, str]:
    """Exchange -> the name that the engine was asked for; the capture is a moment behind."""

    async def all_stored() -> bool:
        return len(await rows(running.database, Exchange)) >= expected

    await eventually(all_stored, 20)
    return {exchange.completion_id: exchange.served for exchange in await rows(running.database, Exchange)}
