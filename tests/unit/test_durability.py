"""The promise of the 202: whatever happens to the process afterwards, what was acknowledged is there, once."""

from __future__ import annotations

import asyncio
import os
import random
import signal
import sqlite3
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import pytest
from sqlalchemy import event

from labeling.database import Database
from labeling.tables import Feedback
from service.auth import create_key
from service.tables import IdempotentAnswer
from tests.running import PROJECT, count, rows, service, settings_for

ROOT = Path(__file__).parents[2]
SENDERS = 6


@dataclass
class Sent:
    """`acknowledged`: id -> comment. `unanswered`: comments that went out under a key and got no answer yet."""

    acknowledged: dict[str, str] = field(default_factory=dict)
    unanswered: list[str] = field(default_factory=list)


@pytest.mark.parametrize("kills", [20, pytest.param(200, marks=pytest.mark.long)])
async def test_kill_loses_nothing_acknowledged(database: Database, kills: int) -> None:
    """Killed again and again in the middle of the traffic; every id that a client was given is stored, none twice.

    Half of the senders use Idempotency-Keys, and repeat in the next life what was not answered.
    """
    _, key = await create_key(database, "test", ["feedback"], PROJECT)
    sent = Sent()
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "tests.feedback_process", database.url),
        cwd=ROOT,
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
    )
    try:
        for number in range(kills if database.is_sqlite else kills // 4):
            await one_life(process, key, f"life {number}", sent)
    finally:
        assert process.stdin is not None
        process.stdin.close()
        await process.wait()
    stored = {row.id: row.comment for row in await rows(database, Feedback)}
    assert len(sent.acknowledged) > 2 * SENDERS, "too few were acknowledged to show anything"
    assert sent.acknowledged.items() <= stored.items()
    assert max(Counter(stored.values()).values()) == 1, "stored twice"
    named = {row.idempotency_key: row.answer["id"] for row in await rows(database, IdempotentAnswer)}
    keyed = {comment: feedback_id for feedback_id, comment in stored.items() if comment.startswith("key")}
    assert named == keyed, "a remembered answer without its row, or a row without its answer"


async def one_life(process: asyncio.subprocess.Process, key: str, name: str, sent: Sent) -> None:
    """A server starts, is sent feedback without pause, and is killed."""
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write(b"start\n")
    pid, port = map(int, (await asyncio.wait_for(process.stdout.readline(), 60)).split())
    headers = {"Authorization": f"Bearer {key}"}
    async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", headers=headers, timeout=30) as client:
        again, sent.unanswered = iter(sent.unanswered), []
        plain = [send(client, name_all(f"{name} sender {i}"), sent) for i in range(SENDERS // 2)]
        keyed = [send(client, name_all(f"key {name} sender {i}"), sent) for i in range(SENDERS // 2)]
        senders = [asyncio.create_task(one) for one in (*plain, *keyed, send(client, again, sent))]
        await asyncio.sleep(random.uniform(0.03, 0.3))
        os.kill(pid, signal.SIGKILL)
        await asyncio.gather(*senders)
    sent.unanswered += again


def name_all(name: str) -> Iterator[str]:
    return (f"{name} number {number}" for number in range(10_000))


async def send(client: httpx.AsyncClient, comments: Iterator[str], sent: Sent) -> None:
    """Until the server is gone. Without a key a comment is sent once only: twice stored is told from twice sent."""
    for comment in comments:
        keyed = comment.startswith("key")
        headers = {"Idempotency-Key": comment} if keyed else {}
        body = {"kind": "comment", "comment": comment, "exchange_id": comment}
        try:
            answer = await client.post("/v1/feedback", json=body, headers=headers)
        except httpx.TransportError:
            sent.unanswered += [comment] * keyed
            return
        assert answer.status_code == 202, answer.text
        sent.acknowledged[answer.json()["id"]] = comment


def full(connection: Any, ends: bool) -> None:
    connection.execute(f"PRAGMA max_page_count={1_000_000 if ends else 1}")


def read_only(connection: Any, ends: bool) -> None:
    connection.execute(f"PRAGMA query_only={0 if ends else 1}")


def nothing(_connection: Any, _ends: bool) -> None: ...


@pytest.mark.parametrize("trouble", [full, read_only, nothing], ids=["full", "read_only", "locked"])
async def test_a_database_in_trouble_acknowledges_nothing(tmp_path: Path, trouble: Callable[[Any, bool], None]) -> None:
    """Without room, read-only or locked by another: 503 and Retry-After, nothing stored; then the same is taken."""
    url = f"sqlite+aiosqlite:///{tmp_path / 'trouble.db'}"
    setup = Database(url)
    await setup.create_tables()
    await setup.close()
    database, over = Database(url), {"over": True}

    @event.listens_for(database.engine.sync_engine, "checkout")
    @event.listens_for(database.writing_engine, "checkout")
    def limit(connection: Any, *_: Any) -> None:
        connection.execute("PRAGMA busy_timeout=50")
        trouble(connection, over["over"])

    body, once = {"kind": "flag", "exchange_id": "x", "comment": "c" * 10_000}, {"Idempotency-Key": "k"}
    with closing(sqlite3.connect(tmp_path / "trouble.db", isolation_level=None)) as other:
        async with service(database, settings_for([])) as running, await running.client("feedback") as client:
            over["over"] = False
            if trouble is nothing:
                other.execute("BEGIN IMMEDIATE")
            for body_sent in (body, [body] * 100):
                refused = await client.post("/v1/feedback", json=body_sent, headers=once)
                assert (refused.status_code, refused.json()["code"]) == (503, "database_unavailable"), refused.text
                assert int(refused.headers["retry-after"]) > 0
            over["over"] = True
            if trouble is nothing:
                other.execute("ROLLBACK")
            assert await count(database, Feedback) == 0
            assert (await client.post("/v1/feedback", json=body, headers=once)).status_code == 202
            assert await count(database, Feedback) == 1
    await database.close()


async def test_one_key_over_two_processes(database_url: str) -> None:
    """Two services that know of each other only through the database: one row, one answer, whoever was asked."""
    setup = Database(database_url)
    await setup.create_tables()
    await setup.close()
    first, second = Database(database_url), Database(database_url)
    async with service(first, settings_for([])) as one, service(second, settings_for([])) as two:
        key = await one.key("feedback")
        await two.state.keys.load(second)
        headers = {"Authorization": f"Bearer {key}", "Idempotency-Key": "k"}
        body = {"kind": "flag", "exchange_id": "x"}
        async with httpx.AsyncClient(headers=headers, timeout=30, trust_env=False) as client:
            urls = [f"{side.url}/v1/feedback" for side in (one, two)] * 50
            answers = await asyncio.gather(*(client.post(url, json=body) for url in urls))
            late = await asyncio.gather(*(client.post(url, json=body) for url in urls[:2]))
            other = [await client.post(url, json={**body, "severity": 1}) for url in urls[:2]]
    assert {answer.status_code for answer in answers} <= {202, 409}
    named = {answer.json()["id"] for answer in (*answers, *late) if answer.status_code == 202}
    assert named == {row.id for row in await rows(first, Feedback)}
    assert len(named) == 1
    assert [answer.status_code for answer in other] == [422, 422]
    await first.close()
    await second.close()
