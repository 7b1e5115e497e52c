"""How unsure the model was of a flagged answer: measured afterwards on an engine, never while a night works."""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path
from typing import Any

import pytest

from labeling import uncertainty as ours
from labeling.database import Database, new_id, now
from labeling.exchanges import record
from labeling.feedback import fold
from labeling.tables import EntryProgress, Exchange, Feedback, FeedbackKind, ItemState, ReviewItem
from loop import uncertainty
from loop.clients import Clients
from loop.runner import Runner
from loop.settings import EngineSettings, MlflowSettings, ProjectSettings
from loop.tables import Night, NightState, Serving
from loop.vllm import EngineUnavailable, Replica
from loop.worker import Worker
from tests.fakes.vllm import FakeVllm
from tests.running import BASE, NOWHERE, PROJECT, eventually, offline_clients, rows


@dataclass
class Installation:
    database: Database
    engine: FakeVllm
    clients: Clients
    labeling: dict[str, Any] = field(default_factory=dict)

    @property
    def project(self) -> ProjectSettings:
        selection = {"random_share": 0, **self.labeling.get("selection", {})}
        known = {"name": PROJECT, "base_dir": "/models/base", "base_name": BASE, "schedule": {"enabled": False}}
        return ProjectSettings.model_validate({**known, "labeling": {**self.labeling, "selection": selection}})

    async def flag(self, answer: str, served: str = BASE, question: str = "Why so?") -> None:
        asked = exchange(question, answer, served)
        flag = Feedback(project=PROJECT, kind=FeedbackKind.FLAG, completion_id=asked.completion_id)
        async with self.database.write() as session:
            await record(session, [asked])
            session.add(flag)
        await fold(self.database, PROJECT, self.project.labeling)

    async def items(self) -> dict[str, ReviewItem]:
        return {item.answer: item for item in await rows(self.database, ReviewItem)}

    async def is_measured(self) -> bool:
        return all(item.uncertainty is not None for item in (await self.items()).values())

    def asked_for(self) -> int:
        return sum("prompt_logprobs" in seen.body for seen in self.engine.seen)


@pytest.fixture
async def installation(database: Database, tmp_path: Path) -> AsyncIterator[Installation]:
    async with FakeVllm(base=BASE) as engine:
        replica = Replica(engine.url)
        clients = offline_clients(database, tmp_path, [replica])
        async with database.write() as session:
            session.add(Serving(project=PROJECT, current=f"{PROJECT}@v1"))
        yield Installation(database, engine, clients)
        await replica.close()
        await clients.label_studio.close()


def exchange(question: str, answer: str, served: str = BASE, **columns: Any) -> Exchange:
    messages = [{"role": "user", "content": question}]
    known = {"project": PROJECT, "completion_id": new_id("c"), "served": served, "messages": messages}
    return Exchange(**{**known, "parameters": {}, "answers": [answer], **columns})


def expected_mean(engine: FakeVllm, answer: str) -> float:
    """What the fake engine gives for these very words."""
    found = [-0.5 - number % 997 / 100 for number in engine.tokens(answer)]
    return sum(found) / len(found)


async def test_mean_is_of_the_answer_alone(installation: Installation) -> None:
    """Neither the prompt's tokens nor the template's count; an empty answer has none."""
    (replica,) = installation.clients.replicas
    asked = [{"role": "system", "content": "Be brief"}, {"role": "user", "content": "Who was it"}]
    found = await uncertainty.mean_log_probability(replica, BASE, asked, "Ada Lovelace it was")
    assert found == pytest.approx(expected_mean(installation.engine, "Ada Lovelace it was"))
    assert await uncertainty.mean_log_probability(replica, BASE, asked, "  ") is None


async def test_items_get_their_uncertainty_and_their_place(installation: Installation) -> None:
    """The surer the model was, the later the item; each is asked for once, a few at a look."""
    installation.labeling = {"selection": {"measured_at_once": 2}}
    for number in range(3):
        await installation.flag(f"answer number {number}", question=f"Question number {number}?")
    before = await installation.items()
    assert [await uncertainty.measure(installation.clients, installation.project) for _ in range(3)] == [2, 1, 0]
    items = await installation.items()
    for answer, item in items.items():
        expected = 1 - math.exp(expected_mean(installation.engine, answer))
        assert item.uncertainty == pytest.approx(expected, abs=1e-4)
        assert item.factors["uncertainty"] != before[answer].factors["uncertainty"]
        assert item.score != before[answer].score
    by_uncertainty = sorted(items.values(), key=lambda item: item.uncertainty or 0)
    assert by_uncertainty == sorted(items.values(), key=lambda item: item.score)
    assert installation.asked_for() == 3


@pytest.mark.parametrize("state", [NightState.CLAIMED, NightState.RUNNING, NightState.PROMOTING])
async def test_nothing_is_asked_while_a_night_works(installation: Installation, state: NightState) -> None:
    """Not even when it is another project's: they share the engines."""
    await installation.flag("An answer")
    night = Night(project="another", date=date(2026, 1, 1), due_at=now(), state=state)
    async with installation.database.write() as session:
        session.add(night)
    assert await uncertainty.measure(installation.clients, installation.project) == 0
    assert installation.engine.seen == []
    async with installation.database.write() as session:
        night.state = NightState.PROMOTED
        await session.merge(night)
    assert await uncertainty.measure(installation.clients, installation.project) == 1


async def test_a_night_that_starts_stops_the_rest_of_a_look(installation: Installation) -> None:
    """Looked for before each request."""
    for number in range(3):
        await installation.flag(f"answer number {number}", question=f"Question number {number}?")
    installation.engine.faults.slow_seconds = 0.2
    look = asyncio.create_task(uncertainty.measure(installation.clients, installation.project))
    while not installation.engine.running:
        await asyncio.sleep(0.01)
    async with installation.database.write() as session:
        session.add(Night(project=PROJECT, date=date(2026, 1, 1), due_at=now(), state=NightState.CLAIMED))
    assert await look == 1


async def test_what_cannot_be_measured_stays_neutral(installation: Installation) -> None:
    """Its adapter serves no more, or it has no text: no factor of it changes, and it is not asked for again."""
    await installation.flag("of an old one", served="support-bot@v7")
    await installation.flag("", question="Silent?")
    before = await installation.items()
    assert await uncertainty.measure(installation.clients, installation.project) == 0
    after = await installation.items()
    assert [item.uncertainty for item in after.values()] == [None, None]
    assert {answer: item.score for answer, item in after.items()} == {a: item.score for a, item in before.items()}
    assert await ours.next_unmeasured(installation.database, PROJECT, 10) == []


async def test_an_engine_that_is_away_is_asked_again(installation: Installation) -> None:
    await installation.flag("An answer")
    installation.engine.faults.status = 500
    with pytest.raises(EngineUnavailable):
        await uncertainty.measure(installation.clients, installation.project)
    installation.engine.faults.status = 0
    assert await uncertainty.measure(installation.clients, installation.project) == 1


async def test_another_answer_is_measured_anew(installation: Installation) -> None:
    """The number belongs to the answer that is shown."""
    await installation.flag("The first answer")
    await uncertainty.measure(installation.clients, installation.project)
    await installation.flag("Quite another answer")
    (item,) = (await installation.items()).values()
    assert (item.answer, item.uncertainty) == ("Quite another answer", None)
    assert await uncertainty.measure(installation.clients, installation.project) == 1


async def test_labelled_before_it_was_measured(installation: Installation) -> None:
    """Its place no longer matters: it is not asked for."""
    await installation.flag("An answer")
    async with installation.database.write() as session:
        item = (await installation.items())["An answer"]
        item.state = ItemState.LABELLED
        await session.merge(item)
    assert await uncertainty.measure(installation.clients, installation.project) == 0
    assert installation.asked_for() == 0


async def test_self_consistency(installation: Installation) -> None:
    """Answers drawn again that agree make sure, others unsure; switched off, nothing is asked."""
    installation.labeling = {"selection": {"measure_uncertainty": "self_consistency", "samples": 3}}
    installation.engine.answer = lambda model, prompt: "blue" if "sky" in prompt else f"it is {prompt[::-1]}"
    await installation.flag("blue", question="Which colour has the sky?")
    await installation.flag("green", question="Which colour has grass?")
    assert await uncertainty.measure(installation.clients, installation.project) == 2
    items = await installation.items()
    assert items["blue"].uncertainty == pytest.approx(0, abs=1e-4)
    assert items["green"].uncertainty is not None
    assert items["green"].uncertainty > 0.5
    assert all(seen.body["temperature"] > 0 for seen in installation.engine.seen)
    installation.labeling = {"selection": {"measure_uncertainty": "off"}}
    await installation.flag("red", question="And blood?")
    assert await uncertainty.measure(installation.clients, installation.project) == 0


async def test_unlikely_answers_enter(installation: Installation) -> None:
    """Of captured exchanges that nobody spoke of, those below the threshold, once each."""
    answers = ["one answer", "another answer", "the third answer"]
    means = {answer: expected_mean(installation.engine, answer) for answer in answers}
    threshold = sorted(means.values())[1] + 1e-6
    installation.labeling = {"entry": {"low_log_probability": threshold, "low_log_probability_share": 1}}
    assert await uncertainty.find_unlikely(installation.clients, installation.project) == 0  # marks the place
    async with installation.database.write() as session:
        (progress,) = await rows(installation.database, EntryProgress)
        mark = int(progress.exchange_id[3:], 16)
        progress.exchange_id = f"ex_{mark - 9:011x}"
        await session.merge(progress)
        said = [exchange(f"Question {a}", a, id=f"ex_{mark - 5 + i:011x}") for i, a in enumerate(answers)]
        await record(session, said)
    for _ in range(2):
        await uncertainty.find_unlikely(installation.clients, installation.project)
        await fold(installation.database, PROJECT, installation.project.labeling)
    items = await installation.items()
    assert set(items) == {answer for answer, mean in means.items() if mean < threshold}
    assert len(items) == 2
    assert all((item.reasons, item.count) == (["low log-probability"], 1) for item in items.values())


async def test_the_worker_measures_in_the_background(installation: Installation, tmp_path: Path) -> None:
    """Also after an engine was away at its first look; Label Studio and MLflow being down changes nothing."""
    installation.labeling = {"selection": {"look_seconds": 0.2}}
    await installation.flag("An answer")
    installation.engine.faults.status = 500
    projects = {PROJECT: installation.project}
    worker = Worker(Runner(installation.clients, projects, EngineSettings(), tmp_path), MlflowSettings(url=NOWHERE))
    await worker.start()
    try:
        await eventually(lambda: installation.engine.seen)
        installation.engine.faults.status = 0
        await eventually(installation.is_measured, seconds=20)
    finally:
        await worker.stop()
