"""PostgreSQL: batches of feedback against single rows over one connection, and four processes at once.

The server is a throw-away one with its usual, durable settings.
"""

from __future__ import annotations

import asyncio
import json
import random
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import asyncpg
from sqlmodel import col, select

from labeling.bulk import BulkInsert
from labeling.database import Database
from labeling.new_feedback import NewFeedback
from labeling.tables import Feedback, FeedbackKind
from service import migrations, servers
from service.bench import postgres
from service.bench.figure import Figure, Say
from service.bench.ingest_server import PROJECT
from service.bench.promises import held, not_measured
from service.idempotency import Once
from service.ingest import BATCH, IngestWriter, Submission
from service.metrics import Metrics
from service.tables import IdempotentAnswer

ROUNDS = 5
SINGLE_SECONDS = 1.0
BATCHES = 20
PROCESSES = 4
KEYS = 4_000  # shared by the processes, each in an order of its own
START_SECONDS = 60.0
BATCHES_PAY = "postgres_batch_vs_single"
TOGETHER, DEADLOCKS = "postgres_processes_rows_minus_acks", "postgres_deadlocks"


def run(say: Say) -> list[Figure]:
    try:
        with _server() as url:
            migrations.upgrade(url)
            return [asyncio.run(_batches(url, say)), *_processes(url, say)]
    except postgres.NoPostgres as missing:
        say(f"PostgreSQL is not measured: {missing}")
        return not_measured((BATCHES_PAY, TOGETHER, DEADLOCKS), str(missing))


@contextmanager
def _server() -> Iterator[str]:
    port = servers.free_ports(1)[0]
    child, folder = postgres.start(port, options=())
    try:
        asyncio.run(child.wait_ready(lambda: _accepts(port), START_SECONDS))
        yield f"postgresql+asyncpg://{postgres.USER}@{servers.HOST}:{port}/postgres"
    finally:
        asyncio.run(child.stop())
        shutil.rmtree(folder)


async def _accepts(port: int) -> bool:
    try:
        connection = await asyncpg.connect(host=servers.HOST, port=port, user=postgres.USER, database="postgres")
    except (OSError, asyncpg.CannotConnectNowError):
        return False
    await connection.close()
    return True


async def _batches(url: str, say: Say) -> Figure:
    """Rows a second each way, in turns. Single rows go the batches' way, as a service without batches would send them;
    what the bare driver makes of them, a prepared statement without a transaction around it, is told beside it."""
    database = Database(url)
    single = await asyncpg.connect(url.replace("+asyncpg", ""))
    await single.set_type_codec("json", encoder=str, decoder=str, schema="pg_catalog")
    alone: list[float] = []
    bare: list[float] = []
    together: list[float] = []
    for number in range(ROUNDS + 1):  # the first warms up
        alone.append(await _singles(database))
        bare.append(await _bare_singles(single, database))
        together.append(await _batch(database))
        say(f"round {number}: single {alone[-1]:.0f}, by the driver {bare[-1]:.0f}, batches {together[-1]:.0f} rows/s")
    await single.close()
    await database.close()
    ratios, to_bare = ([many / one for many, one in zip(together[1:], ones[1:], strict=True)] for ones in (alone, bare))
    seen = f"{statistics.median(together[1:]):.0f} against {statistics.median(alone[1:]):.0f} rows/s"
    spread = f"batches of {BATCH}; {min(ratios):.1f} to {max(ratios):.1f} over {ROUNDS} rounds"
    driver = f"against the driver's own statement {statistics.median(to_bare):.1f}"
    return held(BATCHES_PAY, statistics.median(ratios), f"{seen}; {spread}; {driver}")


async def _singles(database: Database) -> float:
    insert = BulkInsert(Feedback)
    rows = [_row(number) for number in range(20_000)]
    return await _rate(lambda row: database.transact(partial(insert, rows=[row])), rows)


async def _bare_singles(connection: asyncpg.Connection, database: Database) -> float:
    bulk = BulkInsert(Feedback)
    made = [_row(number) for number in range(20_000)]
    places = bulk.places(made[0], database.engine.dialect)
    numbered = ", ".join(f"${number}" for number in range(1, len(places) + 1))
    insert = await connection.prepare(bulk.statement(places, f"VALUES ({numbered})"))
    return await _rate(lambda values: insert.fetch(*values), bulk.values(made, places))


async def _rate(send: Callable[[Any], Awaitable[object]], rows: Iterable[Any]) -> float:
    """Rows a second, one after the other, for SINGLE_SECONDS."""
    started, count = time.perf_counter(), 0
    for row in rows:
        await send(row)
        count += 1
        if time.perf_counter() - started > SINGLE_SECONDS:
            break
    return count / (time.perf_counter() - started)


async def _batch(database: Database) -> float:
    insert = BulkInsert(Feedback)
    batches = [[_row(number) for number in range(BATCH)] for _ in range(BATCHES)]
    started = time.perf_counter()
    for batch in batches:
        await database.transact(partial(insert, rows=batch))
    return BATCH * BATCHES / (time.perf_counter() - started)


def _row(number: int) -> NewFeedback:
    """Each with a comment of its own, of about a kilobyte."""
    return NewFeedback(
        project=PROJECT,
        kind=FeedbackKind.FLAG,
        completion_id=f"chatcmpl-{number}",
        reasons=["wrong_fact"],
        tags={"app": "shop", "shelf": str(number)},
        comment=f"We close at six, not at {number}. " * 30,
        key_id="bench",
    )


def _processes(url: str, say: Say) -> Iterator[Figure]:
    """All claim the same Idempotency-Keys, each in another order: one row a key, one answer, no deadlock."""
    command = [sys.executable, "-m", "service.bench.ingest_postgres", url]
    started = time.perf_counter()
    children = [
        subprocess.Popen([*command, str(number)], stdout=subprocess.PIPE, text=True) for number in range(PROCESSES)
    ]
    told = [json.loads(child.communicate()[0]) for child in children]
    seconds = time.perf_counter() - started
    answered = [set(one["ids"]) for one in told]
    rows, keys, deadlocks = asyncio.run(_after(url))
    say(f"{PROCESSES} processes: {KEYS} keys each in {seconds:.1f} s, {deadlocks} deadlocks")
    failed = sum(one["failed"] for one in told)
    wrong = sum(len(ids ^ answered[0]) for ids in answered) + len(rows ^ answered[0]) + abs(keys - KEYS) + failed
    detail = f"{PROCESSES} processes, {KEYS} shared keys each: {len(rows)} rows, {failed} requests failed"
    yield held(TOGETHER, wrong, detail)
    yield held(DEADLOCKS, deadlocks, "by pg_stat_database")


async def _after(url: str) -> tuple[set[str], int, int]:
    """Ids of the rows under a key, remembered keys, deadlocks that the server has seen."""
    database = Database(url)
    async with database.read() as session:
        rows = set((await session.execute(select(Feedback.id).where(col(Feedback.key_id) == "shared"))).scalars())
        keys = len((await session.execute(select(IdempotentAnswer.idempotency_key))).all())
        connection = await session.connection()
        seen = await connection.exec_driver_sql("SELECT sum(deadlocks)::int FROM pg_stat_database")
        deadlocks = int(seen.scalar_one() or 0)
    await database.close()
    return rows, keys, deadlocks


async def _child(url: str, number: int) -> None:
    """One service process's writer, with every key submitted once."""
    database = Database(url)
    writer = IngestWriter(database, KEYS, Metrics())
    running = asyncio.create_task(writer.run())
    names = [f"key {index}" for index in range(KEYS)]
    random.Random(number).shuffle(names)  # noqa: S311 - an order, not a secret
    submissions = [_submission(name) for name in names]
    answers = await asyncio.gather(*map(writer.submit, submissions), return_exceptions=True)
    failed = [answer for answer in answers if isinstance(answer, BaseException)]
    for error in failed[:3]:
        print(repr(error), file=sys.stderr)
    ids = [answer.body["id"] for answer in answers if not isinstance(answer, BaseException)]
    running.cancel()
    await database.close()
    print(json.dumps({"ids": ids, "failed": len(failed)}))


def _submission(name: str) -> Submission:
    row = _row(0)
    row.key_id = "shared"
    return Submission([row], Once("shared", name, "digest"))


if __name__ == "__main__":
    asyncio.run(_child(sys.argv[1], int(sys.argv[2])))
