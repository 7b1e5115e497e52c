"""The gateway bench's own parts: its engine, its load, its sides, and what it says of what it could not measure."""

from __future__ import annotations

import asyncio
import json
import math
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import msgspec
import pytest

from labeling.database import Database
from labeling.tables import Exchange
from service.bench import gateway, gateway_servers
from service.bench.figure import Figure
from service.bench.gateway import Plan, SideFailed, measured
from service.bench.gateway_servers import Side
from service.bench.instant_engine import WORDS, Engine
from service.bench.load import Load, Seen, drive
from service.bench.passthrough import application
from service.bench.promises import PROMISES
from tests.running import BASE, PROJECT, eventually, rows, service, serving, settings_for

TINY = Plan(rounds=1, warm_up_seconds=0.05, seconds=0.2, stream_tokens=4, tokens_per_second=100)


@asynccontextmanager
async def instant_engine() -> AsyncIterator[str]:
    server = await asyncio.get_running_loop().create_server(Engine, "127.0.0.1", 0)
    async with server:
        yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"


async def test_a_load_counts_what_it_got() -> None:
    """Requests for a while, or one stream a connection; an engine's pace is kept."""
    async with instant_engine() as url:
        side = Side("direct", url, BASE)
        seen = await drive(side.load(4, 0.2))
        assert (set(seen.statuses), seen.failed, seen.events) == ({200}, 0, 0)
        assert seen.answered == seen.statuses[200] > 4
        assert 0 < seen.percentile_ms(0.5) <= seen.percentile_ms(0.99) < 200
        streamed = await drive(side.load(3, stream=True, max_tokens=5))
        assert (streamed.answered, streamed.events) == (3, 3 * 6)  # with the [DONE] of each
        paced = await drive(side.load(3, stream=True, max_tokens=5, tokens_per_second=20))
        assert (paced.events, paced.seconds >= 0.25) == (3 * 6, True)


async def test_a_load_tells_refusals_and_broken_connections() -> None:
    """Neither counts as answered."""

    async def hang_up(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.close()

    async with await asyncio.start_server(hang_up, "127.0.0.1", 0) as server:
        port = server.sockets[0].getsockname()[1]
        seen = await drive(Load(f"http://127.0.0.1:{port}/", "{}", 3, 5))
    assert (seen.failed, seen.answered) == (3, 0)
    assert math.isnan(seen.percentile_ms(0.5))
    with pytest.raises(SideFailed, match="LiteLLM: 3 connections failed"):
        gateway._whole(Side("LiteLLM", "", BASE), seen)
    with pytest.raises(SideFailed, match="401"):
        gateway._whole(Side("LiteLLM", "", BASE), Seen(1.0, statuses={401: 7}))


async def test_the_engine_speaks_as_vllm_does(tmp_path: Path) -> None:
    """Its answers and events pass the gateway, which puts the alias back and can read what it captured."""
    database = Database(f"sqlite+aiosqlite:///{tmp_path / 'n.db'}")
    await database.create_tables()
    async with instant_engine() as url, service(database, settings_for([url])) as running:
        async with await running.client("inference") as client:
            asked = {"model": PROJECT, "messages": [{"role": "user", "content": "hello"}], "max_tokens": 3}
            whole = await client.post("/v1/chat/completions", json=asked)
            streamed = await client.post("/v1/chat/completions", json={**asked, "stream": True})
        assert (whole.json()["model"], whole.json()["id"]) == (PROJECT, whole.headers["x-nightschool-exchange"])
        assert json.loads(streamed.text.splitlines()[0][6:])["model"] == PROJECT

        async def both() -> bool:
            return len(await rows(database, Exchange)) == 2

        await eventually(both)
        kept = {row.streamed: row for row in await rows(database, Exchange)}
        assert kept[False].answers == ["".join(WORDS[:3])]
        assert kept[True].answers == ["".join(WORDS[1:4])]
        assert (kept[True].finish_reason, kept[True].served) == ("stop", BASE)
    await database.close()


async def test_the_pass_through_passes() -> None:
    """The baseline does what it claims: the same answer, byte for byte."""
    async with instant_engine() as url, serving(application(url)) as front:
        seen = await drive(Side("pass-through", front, BASE).load(2, 0.1))
    assert set(seen.statuses) == {200}


async def test_without_litellm_its_figures_are_not_met(monkeypatch: pytest.MonkeyPatch) -> None:
    """A small run of everything else, in processes of their own as `nightschool bench gateway` has them."""
    monkeypatch.setattr(gateway_servers, "litellm_command", lambda: None)
    said: list[str] = []
    figures = {figure.figure: figure for figure in await measured(TINY, said.append)}
    assert figures.keys() == PROMISES["gateway"].keys()
    for name in ("gateway_vs_litellm_rps", "gateway_p99_vs_litellm_p50"):
        assert (figures[name].met, figures[name].as_json()["value"]) == (False, None)
        assert "`make bench` installs it" in figures[name].detail
    bare = figures["gateway_vs_bare_passthrough"]
    assert bare.value > 0
    assert " 0 dropped" in bare.detail
    assert 0 < figures["gateway_stream_vs_direct"].value < 10
    assert any("gateway: round 1: pass-through" in line for line in said)
    json.loads(msgspec.json.encode([figure.as_json() for figure in figures.values()]))


def test_a_figure_that_was_not_measured_is_not_met() -> None:
    assert not Figure("x", float("nan"), 1).met
    assert Figure("x", float("nan"), 1).as_json()["value"] is None
