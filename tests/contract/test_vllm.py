"""The control plane's contract, over the real vLLM on CPU and over the fake that stands for it elsewhere."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
from transformers import AutoTokenizer

from loop.adapter_files import check, read_base_config
from loop.engine_check import MIXED_TOLERANCE, EngineIll, base_stays_base, canary
from loop.probe import ProbeFailed, difference, take_probe, verify_probe
from loop.settings import LINEAR_LAYERS, EngineSettings
from loop.trainers.audit import PROBES, rendered
from loop.trainers.spec import Row
from loop.vllm import AdapterRefused, EngineUnavailable, Message, Replica, RequestRefused, UnknownModel
from tests.adapters import TINY, write_adapter
from tests.fakes.vllm import FakeVllm, Faults

QUESTION: list[Message] = [{"role": "user", "content": "What is the capital of France?"}]
ANSWERED: list[Message] = [*QUESTION, {"role": "assistant", "content": "Paris."}]
RANK = 16


@dataclass
class Engine:
    """One vLLM, real or not, and adapters that fit its base."""

    replica: Replica
    base: str
    config: dict[str, Any]
    folder: Path
    real: bool

    def name(self) -> str:
        """Never used before: names are immutable."""
        return f"bot-{secrets.token_hex(4)}@v2"

    def adapter(self, name: str, **options: Any) -> Path:
        return write_adapter(self.folder / name, self.config, **{"rank": RANK, "base_name": self.base, **options})

    async def loaded(self, **options: Any) -> str:
        name = self.name()
        await self.replica.load(name, self.adapter(name, **options))
        return name


@pytest.fixture(params=["fake", "real"])
def server(request: pytest.FixtureRequest) -> Any:
    """None for the fake. Not async: the real one's start needs an event loop of its own."""
    return request.getfixturevalue("vllm_server") if request.param == "real" else None


@pytest.fixture
async def engine(server: Any, tmp_path: Path) -> AsyncIterator[Engine]:
    if server is None:
        async with FakeVllm() as fake:
            yield Engine(Replica(fake.url), "base", TINY, tmp_path, real=False)
        return
    config = read_base_config(server.base_dir)
    engine = Engine(Replica(server.url), server.base_name, config, tmp_path, real=True)
    yield engine
    for model in await engine.replica.served_models():
        if model.parent is not None:
            await engine.replica.unload(model.name)
    await engine.replica.close()


async def test_it_serves_its_base(engine: Engine) -> None:
    """Healthy, listed, and answering with a text, a time and a reason to stop."""
    await engine.replica.health()
    (base,) = await engine.replica.served_models()
    assert (base.name, base.parent) == (engine.base, None)
    assert base.root
    answer = await engine.replica.ask(engine.base, QUESTION, max_tokens=24)
    assert answer.text.strip()
    assert (answer.seconds > 0, answer.finish_reason) == (True, "stop")
    cut = await engine.replica.ask(engine.base, QUESTION, max_tokens=2)
    assert cut.finish_reason == "length"


async def test_many_answers_keep_their_order(engine: Engine) -> None:
    """Eight at a time, each to its own question."""
    asked = [[{"role": "user", "content": f"Repeat this number: {number}"}] for number in range(6)]
    together = await engine.replica.ask_many(engine.base, asked, max_tokens=8, concurrency=3)
    alone = [await engine.replica.ask(engine.base, messages, max_tokens=8) for messages in asked]
    assert [one.text for one in together] == [one.text for one in alone]


async def test_an_adapter_is_loaded_once_and_unloaded_once(engine: Engine) -> None:
    """Again is done already, both ways; the list names it with its folder and its base."""
    name = engine.name()
    folder = engine.adapter(name)
    for _ in range(2):
        await engine.replica.load(name, folder)
    found = {model.name: model for model in await engine.replica.served_models()}
    assert (found[name].root, found[name].parent) == (str(folder.resolve()), engine.base)
    assert (await engine.replica.ask(name, QUESTION, max_tokens=4)).text
    for _ in range(2):
        await engine.replica.unload(name)
    assert name not in await engine.replica.models()
    with pytest.raises(UnknownModel, match=name):
        await engine.replica.ask(name, QUESTION, max_tokens=4)


async def test_a_name_is_never_loaded_from_another_folder(engine: Engine) -> None:
    """vLLM says only that the name is known; the boundary sees that it is not ours."""
    name = await engine.loaded()
    other = engine.adapter("other", seed=1)
    with pytest.raises(AdapterRefused, match="not from"):
        await engine.replica.load(name, other)


async def test_a_folder_that_the_engine_cannot_see_is_named(engine: Engine) -> None:
    """The cure is the replica's adapter_dir: the path is that of the engine's machine."""
    with pytest.raises(AdapterRefused, match="sees no adapter") as error:
        await engine.replica.load(engine.name(), engine.folder / "nowhere")
    assert "adapter_dir" in error.value.hint
    name = engine.name()
    engine.adapter(name)
    elsewhere = Replica(engine.replica.url, adapter_dir=f"{engine.folder}/")
    await elsewhere.load(name, Path("/ours") / name)
    assert name in await elsewhere.models()
    await elsewhere.close()


async def test_what_the_engine_refuses_is_refused_not_down(engine: Engine) -> None:
    """vLLM answers 500 to a rank above its limit and to a broken file, and lives on."""
    bad = engine.adapter("rank", rank=32)
    with pytest.raises(AdapterRefused, match="rank"):
        await engine.replica.load(engine.name(), bad)
    broken = engine.adapter("broken")
    (broken / "adapter_model.safetensors").write_bytes(b"\0" * 64)
    with pytest.raises(AdapterRefused):
        await engine.replica.load(engine.name(), broken)
    await engine.replica.health()
    assert (await engine.replica.ask(engine.base, QUESTION, max_tokens=4)).text


async def test_the_base_is_no_adapters_name(engine: Engine) -> None:
    """A load under the base's own name is refused."""
    with pytest.raises(AdapterRefused, match=engine.base):
        await engine.replica.load(engine.base, engine.adapter("a"))


async def test_wrong_requests_are_told_from_a_wrong_engine(engine: Engine) -> None:
    """404 and 400 are the caller's; nothing there is "unavailable"."""
    with pytest.raises(UnknownModel, match="no-such-model"):
        await engine.replica.ask("no-such-model", QUESTION, max_tokens=4)
    with pytest.raises(UnknownModel, match="no-such-model"):
        await engine.replica.log_probabilities("no-such-model", "Hello there")
    with pytest.raises(RequestRefused):
        await engine.replica.ask(engine.base, [], max_tokens=4)


async def test_tokens_are_those_of_the_engines_template(engine: Engine) -> None:
    """The answer and the template count; an open question asks for the answer's beginning."""
    whole = await engine.replica.tokens(engine.base, ANSWERED)
    asked = await engine.replica.tokens(engine.base, QUESTION, answered=False)
    assert whole[: len(asked)] == asked
    assert len(whole) > len(asked)
    assert await engine.replica.count_tokens(engine.base, [ANSWERED, QUESTION, ANSWERED]) == [
        len(whole),
        len(await engine.replica.tokens(engine.base, QUESTION)),
        len(whole),
    ]


async def test_the_trainers_tokens_are_the_engines(vllm_server: Any) -> None:
    """The preflight's comparison, on the real pair: equal with one template, unequal with another."""
    tokenizer = AutoTokenizer.from_pretrained(vllm_server.base_dir)
    row = Row.model_validate({"id": "l1", "kind": "label", "messages": ANSWERED})
    replica = Replica(vllm_server.url)
    try:
        found = rendered(tokenizer, [row])
        assert len(found) == len(PROBES) + 1
        for one in found:
            there = await replica.tokens(vllm_server.base_name, one.messages, answered=one.answered)
            assert tuple(there) == one.tokens, one.messages
        tokenizer.chat_template = tokenizer.chat_template.replace("named SmolLM", "named Nightschool")
        other = rendered(tokenizer, [row])[0]
        assert tuple(await replica.tokens(vllm_server.base_name, other.messages, answered=False)) != other.tokens
    finally:
        await replica.close()


async def test_log_probabilities_show_what_is_loaded(engine: Engine) -> None:
    """One a token but the first; the same again for the base, moved by an adapter, not moved by one without effect."""
    tokens = await engine.replica.tokens(engine.base, ANSWERED)
    base = await engine.replica.log_probabilities(engine.base, tokens)
    assert len(base) == len(tokens) - 1
    assert all(value <= 0 for value in base) or not engine.real
    name, zero = await engine.loaded(seed=1), await engine.loaded(size=0)
    assert difference([base], [await engine.replica.log_probabilities(name, tokens)]) > 0.05
    assert difference([base], [await engine.replica.log_probabilities(zero, tokens)]) < 0.001
    assert difference([base], [await engine.replica.log_probabilities(engine.base, tokens)]) < 0.001


async def test_the_probe_knows_the_adapter(engine: Engine) -> None:
    """Taken once, it holds again, and for no other adapter, nor for the base under the adapter's name."""
    name, other, zero = await engine.loaded(seed=1), await engine.loaded(seed=2), await engine.loaded(size=0)
    probe = await take_probe(engine.replica, engine.base, name)
    assert (probe.applied, probe.tolerance < 0.1) == (True, True)
    assert await verify_probe(engine.replica, name, probe) <= probe.tolerance
    with pytest.raises(ProbeFailed, match="not what was examined"):
        await verify_probe(engine.replica, other, probe)
    with pytest.raises(ProbeFailed, match="without effect"):
        await verify_probe(engine.replica, zero, probe)
    without = await take_probe(engine.replica, engine.base, zero)
    assert not without.applied
    with pytest.raises(ProbeFailed, match="no effect at the gate"):
        await verify_probe(engine.replica, zero, without)


async def test_a_healthy_engine_passes_its_checks(engine: Engine) -> None:
    """The base answers, and an adapter's request beside it does not move it."""
    name = await engine.loaded(seed=1)
    await canary(engine.replica, engine.base)
    assert await base_stays_base(engine.replica, engine.base, name) <= MIXED_TOLERANCE


async def test_the_base_stays_itself_after_more_loads_than_slots(engine: Engine) -> None:
    """Unloading frees no slot inside vLLM: after seven loads on five slots the last one is taken, and vLLM on CPU
    answers a base request beside an adapter's with that slot's weights, unless its worker is ours."""
    names = []
    for seed in range(EngineSettings().max_loras + 2):
        names.append(await engine.loaded(seed=seed))
        if len(names) > 3:
            await engine.replica.unload(names[-4])
    assert await base_stays_base(engine.replica, engine.base, names[-1]) <= MIXED_TOLERANCE


async def test_concurrent_log_probabilities_leave_the_engine_alive(engine: Engine) -> None:
    """What lm-eval sends: without --lora-target-modules this kills vLLM on CPU."""
    name = await engine.loaded(seed=1)
    asked = [
        engine.replica.log_probabilities(model, "The capital of France is Paris.") for model in (name, engine.base)
    ]
    more = [engine.replica.log_probabilities(name, f"Number {number} of many sentences.") for number in range(4)]
    assert all(await asyncio.gather(*asked, *more))
    await engine.replica.health()


async def test_a_checked_adapter_is_a_loadable_one(engine: Engine) -> None:
    """What the file check lets through, in each dtype, the engine takes."""
    for dtype in ("BF16", "F16", "F32"):
        name = engine.name()
        folder = engine.adapter(name, dtype=dtype)
        check(folder, engine.config, max_rank=RANK, target_modules=LINEAR_LAYERS, base_name=engine.base)
        await engine.replica.load(name, folder)
        assert (await engine.replica.ask(name, QUESTION, max_tokens=2)).text is not None
        await engine.replica.unload(name)


async def test_an_engine_that_is_down_is_unavailable() -> None:
    """With its address, and retryable."""
    replica = Replica("http://127.0.0.1:1")
    for call in (replica.health(), replica.models(), replica.ask("base", QUESTION, max_tokens=1)):
        with pytest.raises(EngineUnavailable, match=r"127\.0\.0\.1:1"):
            await call
    await replica.close()


@pytest.mark.parametrize(
    ("faults", "said"),
    [
        (Faults(status=500), "500"),
        (Faults(status=503), "503"),
        (Faults(slow_seconds=5), "in time"),
        (Faults(drop_after_chunks=0), "not reachable"),
    ],
)
async def test_an_engine_in_trouble_is_unavailable(faults: Faults, said: str) -> None:
    """Errors of the engine, silence, and a cut connection are all retryable."""
    async with FakeVllm(faults=faults) as fake:
        replica = Replica(fake.url, timeout_seconds=0.5)
        with pytest.raises(EngineUnavailable, match=said):
            await replica.ask("base", QUESTION, max_tokens=4)
        await replica.close()


async def test_an_unwell_engine_is_unavailable() -> None:
    """Its HTTP server answers, the engine behind it does not."""
    async with FakeVllm(faults=Faults(unhealthy=True)) as fake:
        replica = Replica(fake.url)
        with pytest.raises(EngineUnavailable, match="not well"):
            await replica.health()
        await replica.close()


async def test_a_poisoned_engine_is_found() -> None:
    """It answers 200 with empty text to everybody: only the canary sees it."""
    async with FakeVllm(answer=lambda model, prompt: "") as fake:
        replica = Replica(fake.url)
        with pytest.raises(EngineIll, match="empty text"):
            await canary(replica, "base")
        await replica.close()


async def test_the_first_failure_ends_the_others() -> None:
    """Many questions to an engine that fails: one error, and no request left running."""
    async with FakeVllm(faults=Faults(slow_seconds=0.2, status=500)) as fake:
        replica = Replica(fake.url)
        with pytest.raises(EngineUnavailable):
            await replica.ask_many("base", [QUESTION] * 20, max_tokens=4, concurrency=2)
        await asyncio.sleep(0.3)
        assert (fake.running, len(fake.seen) < 6) == (0, True)
        await replica.close()


async def test_the_key_is_sent() -> None:
    """As vLLM's --api-key wants it, with every call."""
    async with FakeVllm() as fake:
        replica = Replica(fake.url, api_key="s3cret")
        await replica.ask("base", QUESTION, max_tokens=4)
        await replica.close()
    assert fake.seen[0].headers["authorization"] == "Bearer s3cret"


async def test_fake_and_real_answer_errors_alike(engine: Engine) -> None:
    """Status and kind of vLLM's own error bodies, which the gateway passes on."""
    async with httpx.AsyncClient(base_url=engine.replica.url, timeout=60, trust_env=False) as http:
        unknown = await http.post("/v1/chat/completions", json={"model": "nope", "messages": QUESTION})
        unload = await http.post("/v1/unload_lora_adapter", json={"lora_name": "nope"})
    assert (unknown.status_code, unknown.json()["error"]["type"]) == (404, "NotFoundError")
    assert (unload.status_code, unload.json()["error"]["type"]) == (404, "NotFoundError")
