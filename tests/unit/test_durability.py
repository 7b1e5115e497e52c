"""The promise of the 202: whatever happens to the process afterwards, what was acknowledged is there, once."""

from __future__ import annotations

import asyncio
import os
import random
import signal
import sys
from collections import Counter
from pathlib import Path

import httpx

from labeling.database import Database
from labeling.tables import Feedback
from service.auth import create_key
from tests.running import PROJECT, rows

ROOT = Path(__file__).parents[2]
KILLS = 20
SENDERS = 6


async def test_kill_loses_nothing_acknowledged(database: Database) -> None:
    """Killed twenty times in the middle of the traffic; every id that a client was given is stored, none twice."""
    _, key = await create_key(database, "test", ["feedback"], PROJECT)
    acknowledged: dict[str, str] = {}
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "tests.feedback_process", database.url),
        cwd=ROOT,
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
    )
    try:
        for number in range(KILLS if database.is_sqlite else KILLS // 4):
            await one_life(process, key, f"life {number}", acknowledged)
    finally:
        assert process.stdin is not None
        process.stdin.close()
        await process.wait()
    stored = {row.id: row.comment for row in await rows(database, Feedback)}
    assert len(acknowledged) > 2 * SENDERS, "too few were acknowledged to show anything"
    assert acknowledged.items() <= stored.items()
    assert max(Counter(stored.values()).values()) == 1, "stored twice"


async def one_life(process: asyncio.subprocess.Process, key: str, name: str, acknowledged: dict[str, str]) -> None:
    """A server starts, is sent feedback without pause, and is killed."""
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write(b"start\n")
    pid, port = map(int, (await asyncio.wait_for(process.stdout.readline(), 60)).split())
    headers = {"Authorization": f"Bearer {key}"}
    async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", headers=headers, timeout=30) as client:
        senders = [asyncio.create_task(send(client, f"{name} sender {i}", acknowledged)) for i in range(SENDERS)]
        await asyncio.sleep(random.uniform(0.03, 0.3))
        os.kill(pid, signal.SIGKILL)
        await asyncio.gather(*senders)


async def send(client: httpx.AsyncClient, name: str, acknowledged: dict[str, str]) -> None:
    """Until the server is gone. A comment is sent once only, so that twice stored is told from twice sent."""
    for number in range(10_000):
        comment = f"{name} number {number}"
        try:
            answer = await client.post(
                "/v1/feedback", json={"kind": "comment", "comment": comment, "exchange_id": comment}
            )
        except httpx.TransportError:
            return
        assert answer.status_code == 202, answer.text
        acknowledged[answer.json()["id"]] = comment
