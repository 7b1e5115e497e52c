"""The data plane, over a fake vLLM on a real port: what passes, what is refused, what happens when things break."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from labeling.database import Database, now
from labeling.tables import Exchange
from loop.tables import Serving
from service.app import assemble, create_app
from service.capture import Captured, _messages, exchange_of
from tests.fakes.vllm import Adapter, FakeVllm, Faults
from tests.running import BASE, PROJECT, Service, count, eventually, rows, service, serving, settings_for

ADAPTER = f"{PROJECT}@v2"
CHAT = "/v1/chat/completions"


def asking(text: str = "hello there", **more: Any) -> dict[str, Any]:
    return {"model": PROJECT, "messages": [{"role": "user", "content": text}], **more}


@pytest.fixture
async def vllm() -> AsyncIterator[FakeVllm]:
    async with FakeVllm(base=BASE) as fake:
        fake.adapters[ADAPTER] = Adapter(ADAPTER, "/adapters/2", 0.5)
        yield fake


@pytest.fixture
async def running(vllm: FakeVllm, tmp_path: Path) -> AsyncIterator[Service]:
    database = Database(f"sqlite+aiosqlite:///{tmp_path / 'n.db'}")
    await database.create_tables()
    async with service(database, settings_for([vllm.url], max_body_bytes=100_000)) as found:
        yield found
    await database.close()


@pytest.fixture
async def client(running: Service) -> AsyncIterator[httpx.AsyncClient]:
    async with await running.client("inference", "feedback") as found:
        yield found


async def test_alias_goes_out_and_comes_back(running: Service, client: httpx.AsyncClient, vllm: FakeVllm) -> None:
    """vLLM is asked for the served name; the app sees only the alias it asked for, in bodies and in every chunk."""
    await running.state.aliases.set(PROJECT, ADAPTER)
    whole = await client.post(CHAT, json=asking())
    streamed = await client.post(CHAT, json=asking(stream=True))
    text = await client.post("/v1/completions", json={"model": PROJECT, "prompt": "one two"})
    assert [seen.body["model"] for seen in vllm.seen] == [ADAPTER] * 3
    assert whole.json()["model"] == PROJECT
    assert whole.json()["choices"][0]["message"]["content"] == f"{ADAPTER} answers: hello there"
    events = [json.loads(line[6:]) for line in streamed.text.splitlines() if line.startswith("data: {")]
    assert {event["model"] for event in events} == {PROJECT}
    assert streamed.text.endswith("data: [DONE]\n\n")
    assert text.json()["model"] == PROJECT


async def test_answer_that_quotes_the_field_is_left_alone(client: httpx.AsyncClient, vllm: FakeVllm) -> None:
    """Text that looks like the model field stays as the model wrote it."""
    said = f'{{"model":"{BASE}"}}'
    vllm.answer = lambda _model, _prompt: said
    answer = (await client.post(CHAT, json=asking())).json()
    assert answer["choices"][0]["message"]["content"] == said
    assert answer["model"] == PROJECT


async def test_every_field_passes_byte_for_byte(client: httpx.AsyncClient, vllm: FakeVllm) -> None:
    """Tools, odd numbers and unknown fields reach vLLM exactly as they were spelt."""
    tools = [{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}]
    fields = asking(tools=tools, logprobs=True, n=2, stop=["x"], seed=7, temperature=1e-5, new_field={"a": [None, 1.0]})
    big = 12345678901234567890123
    await client.post(CHAT, content=json.dumps({**fields, "big": big}))
    assert vllm.seen[0].body == {**fields, "model": BASE, "big": big}


async def test_exchange_id_is_ours(client: httpx.AsyncClient, vllm: FakeVllm) -> None:
    """A client cannot choose the completion id; its own request id is kept beside it."""
    answer = await client.post(CHAT, json=asking(), headers={"X-Request-Id": "forged"})
    assert answer.headers["x-nightschool-exchange"] == answer.json()["id"]
    assert answer.json()["id"] == f"chatcmpl-{vllm.seen[0].headers['x-request-id']}"
    assert "forged" not in answer.json()["id"]
    assert answer.headers["x-request-id"] == "forged"
    text = await client.post("/v1/completions", json={"model": PROJECT, "prompt": "x"})
    assert text.headers["x-nightschool-exchange"] == text.json()["id"]


async def test_client_key_stays_here(client: httpx.AsyncClient, vllm: FakeVllm) -> None:
    """The app's key is ours alone: vLLM never sees it."""
    await client.post(CHAT, json=asking())
    assert "authorization" not in vllm.seen[0].headers


async def test_openai_client_works_unchanged(running: Service, vllm: FakeVllm) -> None:
    """The official client: list, ask, stream, and its exception types for our errors and vLLM's."""
    key = await running.key("inference")
    async with openai.AsyncOpenAI(base_url=f"{running.url}/v1", api_key=key, max_retries=0) as app:
        assert [model.id async for model in app.models.list()] == [PROJECT]
        assert (await app.models.retrieve(PROJECT)).id == PROJECT
        with pytest.raises(openai.NotFoundError):
            await app.models.retrieve(ADAPTER)
        messages: Any = [{"role": "user", "content": "one two"}]
        answer = await app.chat.completions.create(model=PROJECT, messages=messages)
        assert answer.choices[0].message.content == f"{BASE} answers: one two"
        stream = await app.chat.completions.create(model=PROJECT, messages=messages, stream=True)
        parts = [chunk.choices[0].delta.content or "" async for chunk in stream]
        assert "".join(parts) == f"{BASE} answers: one two"
        with pytest.raises(openai.NotFoundError):
            await app.chat.completions.create(model="nobody", messages=messages)
        vllm.faults.drop_after_chunks = 2
        with pytest.raises(openai.APIError, match="broke off"):
            _ = [c async for c in await app.chat.completions.create(model=PROJECT, messages=messages, stream=True)]


async def test_vllm_errors_pass_as_they_are(client: httpx.AsyncClient, vllm: FakeVllm) -> None:
    """Status and body of the engine's own refusals, and its 500."""
    refused = await client.post(CHAT, json={"model": PROJECT, "messages": "?"})
    direct = await httpx.AsyncClient().post(f"{vllm.url}{CHAT}", json={"model": BASE, "messages": "?"})
    assert (refused.status_code, refused.json()) == (direct.status_code, direct.json()) == (400, direct.json())
    vllm.faults.status = 500
    failed = await client.post(CHAT, json=asking())
    assert failed.status_code == 500
    assert failed.json()["error"]["message"] == "a fault on demand"


async def test_unknown_and_hidden_names(client: httpx.AsyncClient, vllm: FakeVllm) -> None:
    """Without scope `read` an immutable name is as unknown as any other; the engine is not even asked."""
    for model in ("nobody", ADAPTER, BASE, f"{PROJECT}@v1", "", 7, None):
        answer = await client.post(CHAT, json={**asking(), "model": model})
        assert answer.status_code == (404 if model and isinstance(model, str) else 400), model
        assert set(answer.json()["error"]) == {"message", "type", "param", "code"}
    assert not vllm.seen


async def test_reader_may_ask_for_immutable_names(running: Service, vllm: FakeVllm) -> None:
    """With scope `read` a version can be asked by name; version 1 is the base."""
    async with await running.client("inference", "read") as reader:
        for name, served in ((ADAPTER, ADAPTER), (BASE, BASE), (f"{PROJECT}@v1", BASE)):
            answer = await reader.post(CHAT, json={**asking(), "model": name})
            assert answer.json()["model"] == name
            assert vllm.seen[-1].body["model"] == served
        assert (await reader.post(CHAT, json={**asking(), "model": f"{PROJECT}@v9"})).status_code == 404


async def test_other_projects_are_invisible(vllm: FakeVllm, tmp_path: Path) -> None:
    """A key of one project lists and reaches that project's alias only."""
    database = Database(f"sqlite+aiosqlite:///{tmp_path / 'two.db'}")
    await database.create_tables()
    async with service(database, settings_for([vllm.url], ["one", "two"])) as running:
        async with await running.client("inference", project="one") as app:
            assert [card["id"] for card in (await app.get("/v1/models")).json()["data"]] == ["one"]
            assert (await app.post(CHAT, json={**asking(), "model": "two"})).status_code == 404
            assert (await app.get("/v1/models/two/current")).status_code == 404
        async with await running.client("inference", project=None) as app:
            assert [card["id"] for card in (await app.get("/v1/models")).json()["data"]] == ["one", "two"]
    await database.close()


BAD_BODIES = (
    (b"", 400),
    (b"{", 400),
    (b"[]", 400),
    (b'"text"', 400),
    (b'{"model":"support-bot","x":"\xff\xfe"}', 400),
    (b'{"model":"support-bot","x":"\\ud800"}', 400),
    (b'{"model":"support-bot","x":NaN}', 400),
    (b'{"model":"support-bot","x":' + b"[" * 50_000, 400),
    (b'{"model":"support-bot","x":"' + b"a" * 200_000 + b'"}', 413),
)


async def test_bad_bodies(client: httpx.AsyncClient, vllm: FakeVllm) -> None:
    """Each is refused in OpenAI's form, before the engine sees it."""
    for body, status in BAD_BODIES:
        answer = await client.post(CHAT, content=body)
        assert (answer.status_code, answer.json()["error"]["code"]) == (status, status), body[:40]
    assert not vllm.seen


async def test_huge_body_without_length(client: httpx.AsyncClient, vllm: FakeVllm) -> None:
    """A chunked body is cut off at the limit too."""

    async def endless() -> AsyncIterator[bytes]:
        for _ in range(50):
            yield b"a" * 10_000

    answer = await client.post(CHAT, content=endless())
    assert answer.status_code == 413
    assert not vllm.seen


async def test_wrong_keys_and_methods(running: Service, client: httpx.AsyncClient) -> None:
    """401 and 403 in OpenAI's form; GET of a completion is 405."""
    async with httpx.AsyncClient(base_url=running.url) as stranger:
        assert (await stranger.post(CHAT, json=asking())).json()["error"]["code"] == 401
        assert (await stranger.get("/v1/models", headers={"Authorization": "Bearer ns_x"})).status_code == 401
    async with await running.client("feedback") as reporter:
        assert (await reporter.post(CHAT, json=asking())).status_code == 403
    assert (await client.get(CHAT)).status_code == 405


async def test_hang_up_reaches_the_engine(running: Service, client: httpx.AsyncClient, vllm: FakeVllm) -> None:
    """A client that leaves, in mid-stream or while it waits, stops the generation; nothing stays in flight."""
    vllm.faults.chunk_seconds = 0.2
    async with client.stream("POST", CHAT, json=asking("a b c d e f g h i j k l m n", stream=True)) as answer:
        async for _ in answer.aiter_lines():
            break
    await eventually(lambda: vllm.aborted == 1 and not vllm.running)
    vllm.faults = Faults(slow_seconds=30)
    with pytest.raises(httpx.ReadTimeout):
        await client.post(CHAT, json=asking(), timeout=0.3)
    await eventually(lambda: vllm.aborted == 2 and not vllm.running)
    await eventually(lambda: running.state.aliases.in_flight(BASE) == 0)


async def test_aborted_stream_is_kept_as_far_as_it_was_seen(
    running: Service, client: httpx.AsyncClient, vllm: FakeVllm
) -> None:
    """What the user saw before leaving can still be flagged."""
    vllm.faults.chunk_seconds = 0.1
    async with client.stream("POST", CHAT, json=asking("a b c d e f g h i j k", stream=True)) as answer:
        lines = answer.aiter_lines()
        for _ in range(6):
            await anext(lines)
    await eventually(lambda: count_is(running, 1))
    kept = (await rows(running.database, Exchange))[0]
    assert kept.finish_reason == "aborted"
    assert f"{BASE} answers: a b c d e f g h i j k".startswith(kept.answers[0])


async def count_is(running: Service, wanted: int) -> bool:
    return await count(running.database, Exchange) == wanted


async def test_stream_that_breaks_says_so(client: httpx.AsyncClient, vllm: FakeVllm) -> None:
    """An engine that dies in mid-stream: an error event, no [DONE] that would call the answer whole."""
    vllm.faults.drop_after_chunks = 3
    answer = await client.post(CHAT, json=asking(stream=True))
    last = [line for line in answer.text.splitlines() if line][-1]
    assert json.loads(last[6:])["error"]["code"] == 502
    assert "[DONE]" not in answer.text


async def test_engine_down(client: httpx.AsyncClient, vllm: FakeVllm) -> None:
    """503 with Retry-After, in OpenAI's form: before a connection, and when it dies without an answer."""
    vllm.faults.drop_after_chunks = 0
    assert (await client.post(CHAT, json=asking())).status_code == 503
    await vllm.__aexit__()
    answer = await client.post(CHAT, json=asking())
    assert answer.status_code == 503
    assert int(answer.headers["retry-after"]) > 0
    assert answer.json()["error"]["type"] == "ServiceUnavailableError"
    assert (await client.get("/ready")).status_code == 503


async def test_replica_that_refuses_or_lacks_the_adapter_is_passed_over(tmp_path: Path) -> None:
    """Of three replicas one is down and one restarted without the adapter: no request fails, the third serves all."""
    database = Database(f"sqlite+aiosqlite:///{tmp_path / 'n.db'}")
    await database.create_tables()
    async with AsyncExitStack() as stack:
        fakes = [await stack.enter_async_context(FakeVllm(base=BASE)) for _ in range(2)]
        fakes[1].adapters[ADAPTER] = Adapter(ADAPTER, "/adapters/2", 0.5)
        urls = ["http://127.0.0.1:9", *(fake.url for fake in fakes)]
        running = await stack.enter_async_context(service(database, settings_for(urls)))
        await running.state.aliases.set(PROJECT, ADAPTER)
        client = await stack.enter_async_context(await running.client("inference"))
        answers = await asyncio.gather(*(client.post(CHAT, json=asking(str(i))) for i in range(20)))
        assert {answer.status_code for answer in answers} == {200}
        assert len(fakes[1].seen) == 20
        fakes[1].adapters.clear()
        assert (await client.post(CHAT, json=asking())).status_code == 503
    await database.close()


async def test_least_busy_replica_first(tmp_path: Path) -> None:
    """A slow replica gets no more work while the other is free."""
    database = Database(f"sqlite+aiosqlite:///{tmp_path / 'n.db'}")
    await database.create_tables()
    async with FakeVllm(base=BASE) as slow, FakeVllm(base=BASE) as quick:
        slow.faults.slow_seconds = 2.0
        async with (
            service(database, settings_for([slow.url, quick.url])) as running,
            await running.client("inference") as client,
        ):
            first = asyncio.create_task(client.post(CHAT, json=asking()))
            await eventually(lambda: slow.running == 1)
            for _ in range(5):
                await client.post(CHAT, json=asking())
            assert (len(slow.seen), len(quick.seen)) == (1, 5)
            await eventually(lambda: running.state.aliases.in_flight(BASE) == 1)
            assert (await first).status_code == 200
            await eventually(lambda: running.state.aliases.in_flight(BASE) == 0)
    await database.close()


async def test_switch_is_never_mixed(running: Service, client: httpx.AsyncClient, vllm: FakeVllm) -> None:
    """A stream begun on the old name ends on it; the next request has the new one; drain sees both."""
    aliases = running.state.aliases
    vllm.faults.chunk_seconds = 0.05
    old = asyncio.create_task(client.post(CHAT, json=asking(stream=True)))
    await eventually(lambda: vllm.running == 1)
    await aliases.set(PROJECT, ADAPTER)
    new = asyncio.create_task(client.post(CHAT, json=asking()))
    await eventually(lambda: vllm.seen[-1].body["model"] == ADAPTER)
    assert aliases.in_flight(BASE) == 1
    said = "".join(
        json.loads(line[6:])["choices"][0]["delta"]["content"]
        for line in (await old).text.splitlines()
        if line.startswith("data: {")
    )
    assert said == f"{BASE} answers: hello there"
    assert (await new).json()["choices"][0]["message"]["content"].startswith(ADAPTER)
    await eventually(lambda: aliases.in_flight(BASE) == 0)


async def test_captured_as_it_was(running: Service, client: httpx.AsyncClient, vllm: FakeVllm) -> None:
    """Messages, parameters, every choice, the served name, the client's ids: whole and streamed alike."""
    headers = {"X-Request-Id": "r1", "X-Session-Id": "s1"}
    whole = await client.post(CHAT, json=asking(n=2, temperature=0.5), headers=headers)
    await client.post(CHAT, json=asking(n=2, temperature=0.5, stream=True), headers=headers)
    await client.post("/v1/completions", json={"model": PROJECT, "prompt": "one two"})
    await eventually(lambda: count_is(running, 3))
    kept = {row.completion_id: row for row in await rows(running.database, Exchange)}
    first = kept.pop(whole.json()["id"])
    streamed, text = sorted(kept.values(), key=lambda row: not row.streamed)
    assert first.messages == asking()["messages"]
    assert first.answers == streamed.answers == [f"{BASE} answers: hello there"] * 2
    assert first.parameters == {"n": 2, "temperature": 0.5}
    assert (first.served, first.request_id, first.session_id, first.finish_reason) == (BASE, "r1", "s1", "stop")
    assert (text.messages, text.answers) == ([{"role": "user", "content": "one two"}], [f"{BASE} answers: one two"])
    assert first.latency_ms > 0


async def test_tool_calls_are_captured(running: Service) -> None:
    """Where the model calls a tool, the call is the answer that was seen."""
    call = {"index": 0, "function": {"name": "find", "arguments": '{"q":'}}
    rest = {"index": 0, "function": {"arguments": '"x"}'}}
    events = [{"choices": [{"index": 0, "delta": {"tool_calls": [part]}}]} for part in (call, rest)]

    body = b"".join(b"data: " + json.dumps(event).encode() + b"\n\n" for event in events)
    exchange = exchange_of(
        Captured(PROJECT, "c", BASE, json.dumps(asking()).encode(), body, True, False, 1.0, None, None, "k")
    )
    assert json.loads(exchange.answers[0]) == [{"name": "find", "arguments": '{"q":"x"}'}]


async def test_capture_never_holds_up_an_answer(vllm: FakeVllm, tmp_path: Path) -> None:
    """With the database gone every request is still answered, the queue stays bounded and drops are counted."""
    database = Database(f"sqlite+aiosqlite:///{tmp_path / 'n.db'}")
    await database.create_tables()
    async with service(database, settings_for([vllm.url], capture_queue=5)) as running:
        await running.state.aliases.set(PROJECT, ADAPTER)
        async with await running.client("inference", "feedback") as client:
            await lose(database, tmp_path)
            for _ in range(20):
                answer = await client.post(CHAT, json=asking())
                assert answer.json()["choices"][0]["message"]["content"].startswith(ADAPTER)
            assert running.state.capture.waiting() <= 5
            figures = (await client.get("/metrics")).text
            assert 'nightschool_capture_dropped_total{reason="queue_full"}' in figures
            assert (await client.get("/ready")).status_code == 503
            refused = await client.post("/v1/feedback", json={"kind": "flag", "exchange_id": "x"})
            assert refused.status_code == 503
            assert int(refused.headers["retry-after"]) > 0


async def lose(database: Database, folder: Path) -> None:
    """The database file is gone, and nothing can be put in its place."""
    await database.close()
    for file in folder.glob("n.db*"):
        file.unlink()
    (folder / "n.db").mkdir()


async def test_aliases_follow_the_serving_table(database: Database, vllm: FakeVllm) -> None:
    """A promotion recorded by another process is served within seconds; an unchanged row undoes no `set`."""
    settings = settings_for([vllm.url])
    async with database.write() as session:
        session.add(Serving(project=PROJECT, current=f"{PROJECT}@v1"))
    state = assemble(settings, database)
    await state.aliases.load(database)
    assert state.aliases.current(PROJECT) == BASE
    await state.aliases.set(PROJECT, "something")
    await state.aliases.load(database)
    assert state.aliases.current(PROJECT) == "something"
    async with serving(create_app(settings, state)):
        async with database.write() as session:
            row = await session.get(Serving, PROJECT)
            assert row is not None
            row.current, row.updated_at = ADAPTER, now()
        await eventually(lambda: state.aliases.current(PROJECT) == ADAPTER)


async def test_current_for_apps_that_talk_to_vllm(running: Service, client: httpx.AsyncClient) -> None:
    """The served name and its version; an unknown alias is a problem."""
    assert (await client.get(f"/v1/models/{PROJECT}/current")).json() == {
        "alias": PROJECT,
        "served": BASE,
        "version": 1,
        "base": BASE,
    }
    await running.state.aliases.set(PROJECT, ADAPTER)
    assert (await client.get(f"/v1/models/{PROJECT}/current")).json()["version"] == 2
    missing = await client.get("/v1/models/nobody/current")
    assert missing.status_code == 404
    assert missing.headers["content-type"] == "application/problem+json"


def test_messages_that_are_none_are_not_taken_for_any() -> None:
    """vLLM ignores `messages` beside a prompt; stored as they came, they would stop the project's labelling."""
    answer = json.dumps({"choices": [{"index": 0, "text": "hello"}]}).encode()
    strange: tuple[object, ...] = (["y"], None, "text", {})
    for messages in strange:
        body = json.dumps({"model": PROJECT, "prompt": "one", "messages": messages}).encode()
        exchange = exchange_of(Captured(PROJECT, "c", BASE, body, answer, False, False, 1.0, None, None, "k"))
        assert exchange.messages == [{"role": "user", "content": "one"}]


async def test_requests_nested_too_deeply_are_answered_and_not_kept(
    running: Service, client: httpx.AsyncClient, vllm: FakeVllm
) -> None:
    """What could not be read back from the database must not get into it."""
    for depth in (10, 70, 500):
        deep = b"[" * depth + b"]" * depth
        body = b'{"model":"%s","messages":[{"role":"user","content":"d%d"}],"x":%s}' % (PROJECT.encode(), depth, deep)
        assert (await client.post(CHAT, content=body)).status_code == 200
    await client.post(CHAT, json=asking())
    await eventually(lambda: count_is(running, 2))
    kept = sorted(await rows(running.database, Exchange), key=lambda row: row.created_at)[:1]
    assert [exchange.messages[0]["content"] for exchange in kept] == ["d10"]


async def test_a_web_socket_is_turned_away(client: httpx.AsyncClient, running: Service) -> None:
    """403 before it is accepted, no error in our log."""
    upgrade = {
        "Connection": "Upgrade",
        "Upgrade": "websocket",
        "Sec-WebSocket-Version": "13",
        "Sec-WebSocket-Key": "dGhlIHNhbXBsZSBub25jZQ==",
    }
    assert (await client.get("/v1/chat/completions", headers=upgrade)).status_code in {403, 405}


def test_what_a_completion_was_asked_is_its_prompt() -> None:
    """vLLM's completions pass over `messages`."""
    request = {"prompt": "Once upon", "messages": [{"role": "user", "content": "never seen"}]}
    assert _messages(request, chat=False) == [{"role": "user", "content": "Once upon"}]
    assert _messages(request, chat=True) == [{"role": "user", "content": "never seen"}]
