"""What a durable acknowledgement costs: the feedback route against one commit a request, against acknowledging before
the write, and against storing nothing; and PostgreSQL's batches against single rows.

The four ways run as servers beside each other and are asked in turns, so that a busy machine is busy for all of them.
"""

from __future__ import annotations

import asyncio
import json
import re
import secrets
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sqlmodel import col, select

from labeling.database import Database
from labeling.exchanges import record
from labeling.tables import Exchange, Feedback
from service import migrations
from service.bench import ingest_postgres
from service.bench.figure import Figure, Say
from service.bench.http_load import Spec, spec_as_json
from service.bench.ingest_server import PROJECT, Mode
from service.bench.promises import held

CONNECTIONS = 64
BODY_BYTES = 1024
EXCHANGES = 1_000
ROUNDS = 6
SECONDS = 2.5
NAMES = {
    Mode.PER_ROW: "durable_vs_per_row_commit",
    Mode.ACK_FIRST: "durable_vs_ack_first",
    Mode.NO_STORAGE: "durable_vs_no_storage",
}


@dataclass
class Server:
    mode: Mode
    folder: Path
    process: subprocess.Popen[str]
    port: int
    key: str
    rates: list[float] = field(default_factory=list)
    ids: list[str] = field(default_factory=list)

    @property
    def url(self) -> str:
        return database_url(self.folder)


def run(say: Say) -> list[Figure]:
    folder = Path(tempfile.mkdtemp(prefix="nightschool-bench-"))
    try:
        return [*_routes(folder, say), *ingest_postgres.run(say)]
    finally:
        shutil.rmtree(folder)


def _routes(folder: Path, say: Say) -> Iterator[Figure]:
    bodies = _prepare(folder)
    with ExitStack() as closing:
        servers = {mode: closing.enter_context(_served(mode, folder / mode)) for mode in Mode}
        for number in range(ROUNDS + 1):
            order = list(servers.values())
            for server in order if number % 2 else reversed(order):
                rate = _asked(server, bodies, SECONDS if number else 0.5)
                say(f"round {number}: {server.mode} {rate:.0f} requests/s{'' if number else ' (warming up)'}")
                if number:
                    server.rates.append(rate)
        durable = servers[Mode.DURABLE]
        for mode, name in NAMES.items():
            yield _ratio(name, durable, servers[mode])
    storing = [server for mode, server in servers.items() if mode is not Mode.NO_STORAGE]
    stored = {server.mode: asyncio.run(_stored(server.url)) for server in storing}
    yield _missing(servers, stored)


def _ratio(name: str, ours: Server, theirs: Server) -> Figure:
    """The median over the rounds, each compared within itself."""
    ratios = [mine / other for mine, other in zip(ours.rates, theirs.rates, strict=True)]
    seen = f"{statistics.median(ours.rates):.0f} against {statistics.median(theirs.rates):.0f} requests/s"
    spread = f"{min(ratios):.2f} to {max(ratios):.2f} over {len(ratios)} rounds"
    return held(name, statistics.median(ratios), f"{seen}; {spread}")


def _missing(servers: dict[Mode, Server], stored: dict[Mode, list[str]]) -> Figure:
    """Every id that was acknowledged is there once, and no other row."""
    wrong = sum(abs(len(ids) - len(servers[mode].ids)) for mode, ids in stored.items())
    wrong += sum(len(set(ids) ^ set(servers[mode].ids)) for mode, ids in stored.items())
    seen = ", ".join(f"{mode} {len(ids)}" for mode, ids in stored.items())
    return held("rows_minus_acks", wrong, f"rows: {seen}")


def database_url(folder: Path) -> str:
    return f"sqlite+aiosqlite:///{folder / 'bench.db'}"


def _prepare(folder: Path) -> list[str]:
    """Each server's database, with the exchanges that the bodies are about; flags of 1 KB."""
    known = [f"chatcmpl-{secrets.token_hex(16)}" for _ in range(EXCHANGES)]
    for mode in Mode:
        (folder / mode).mkdir()
        migrations.upgrade(database_url(folder / mode))
        asyncio.run(_fill(database_url(folder / mode), known))
    return [_body(completion_id) for completion_id in known]


def _body(completion_id: str) -> str:
    body: dict[str, Any] = {"exchange_id": completion_id, "kind": "flag", "reasons": ["wrong_fact"], "severity": 0.7}
    body |= {"reporter": f"user-{secrets.token_hex(4)}", "tags": {"app": "shop"}, "comment": ""}
    room = BODY_BYTES - len(json.dumps(body))
    return json.dumps({**body, "comment": "We close at six. "[: room % 17] + "We close at six. " * (room // 17)})


async def _fill(url: str, known: list[str]) -> None:
    database = Database(url)
    columns: dict[str, Any] = {"parameters": {}, "messages": [{"role": "user", "content": "When do you close?"}]}
    rows = [
        Exchange(project=PROJECT, completion_id=name, served="base", answers=["At five."], **columns) for name in known
    ]
    async with database.write() as session:
        await record(session, rows)
    await database.close()


async def _stored(url: str) -> list[str]:
    database = Database(url)
    async with database.read() as session:
        ids = list((await session.execute(select(col(Feedback.id)))).scalars())
    await database.close()
    return ids


@contextmanager
def _served(mode: Mode, folder: Path) -> Iterator[Server]:
    command = [sys.executable, "-m", "service.bench.ingest_server", mode, database_url(folder)]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        yield Server(mode, folder, process, **json.loads(process.stdout.readline()))
    finally:
        process.communicate("")


def _asked(server: Server, bodies: list[str], seconds: float) -> float:
    """Requests a second, until the last one is stored."""
    spec, ids = server.folder / "spec.json", server.folder / "ids"
    told = Spec(server.port, "/v1/feedback", server.key, bodies, CONNECTIONS, seconds, str(ids))
    spec.write_text(spec_as_json(told), encoding="utf-8")
    command = [sys.executable, "-m", "service.bench.http_load", str(spec)]
    seen = json.loads(subprocess.run(command, stdout=subprocess.PIPE, check=True, timeout=60 + seconds).stdout)
    ended = time.perf_counter()
    while _waiting(server):
        time.sleep(0.005)
    server.ids += ids.read_text(encoding="utf-8").split()
    if seen["other"]:
        raise RuntimeError(f"{server.mode}: {seen['other']} requests were not answered with 202")
    return float(seen["acknowledged"] / (seen["seconds"] + time.perf_counter() - ended))


def _waiting(server: Server) -> int:
    with urllib.request.urlopen(f"http://127.0.0.1:{server.port}/metrics") as answer:
        found = re.search(rb"^nightschool_ingest_waiting (\S+)$", answer.read(), re.MULTILINE)
    assert found is not None
    return int(float(found[1]))
