"""What one more flag costs with a million review items behind it, against ten thousand: real rows, SQLite, `FULL`.

Timed is all that happens between a stored feedback and the choice of the next tasks: the fold, with its commit, and the
push's look at the queue. The two databases take turns. The history is written by SQL, with the tables and indexes that
every installation has.
"""

from __future__ import annotations

import asyncio
import sqlite3
import statistics
import tempfile
import time
from pathlib import Path

import labeling.tables  # noqa: F401  # every table is known before any is created
import loop.tables  # noqa: F401
import service.tables  # noqa: F401
from labeling import push
from labeling.database import Database, new_id
from labeling.feedback import fold
from labeling.settings import LabelingSettings
from labeling.tables import Exchange, Feedback, FeedbackKind
from service.bench.figure import Figure, Say
from service.bench.promises import held

FEW, MANY = 10_000, 1_000_000
PROJECT = "bench"
TURNS = 300  # at each level of folding
WARM_UP = 10
OPEN_TASKS = 500
ROOM = 50  # how many tasks the push may choose
LEVELS = {
    "identical": LabelingSettings(max_open_tasks=OPEN_TASKS),
    "near": LabelingSettings(max_open_tasks=OPEN_TASKS, fold="near"),
}


def run(say: Say) -> list[Figure]:
    return asyncio.run(_run(say))


async def _run(say: Say) -> list[Figure]:
    with tempfile.TemporaryDirectory(prefix="nightschool-bench-") as folder:
        few, many = [await _database(Path(folder), items, say) for items in (FEW, MANY)]
        try:
            seen = {level: await _turns(few, many, settings, say) for level, settings in LEVELS.items()}
        finally:
            await few.close()
            await many.close()
    ratios = {level: with_many / with_few for level, (with_few, with_many) in seen.items()}
    detail = "; ".join(
        f"{level}: {with_few * 1e3:.1f} ms with {FEW:,}, {with_many * 1e3:.1f} ms with {MANY:,}"
        for level, (with_few, with_many) in seen.items()
    )
    return [held("queue_1m_vs_10k", max(ratios.values()), f"median of {TURNS}; {detail}")]


async def _turns(few: Database, many: Database, settings: LabelingSettings, say: Say) -> tuple[float, float]:
    """Median seconds of one more, each side."""
    times: tuple[list[float], list[float]] = ([], [])
    for turn in range(WARM_UP + TURNS):
        sides = list(zip((few, many), times, strict=True))
        for database, seconds in sides if turn // 2 % 2 else reversed(sides):
            seconds.append(await _one_more(database, turn, settings))
    with_few, with_many = (statistics.median(seconds[WARM_UP:]) for seconds in times)
    say(f"queue: {settings.fold}: {with_few * 1e3:.2f} ms with {FEW:,}, {with_many * 1e3:.2f} ms with {MANY:,}")
    return with_few, with_many


async def _one_more(database: Database, turn: int, settings: LabelingSettings) -> float:
    """Half of them ask something new, half in other words what was asked before."""
    question = f"what is the price of article {settings.fold} {turn // 2}"
    text = question if turn % 2 == 0 else f"Hi, could you tell me {question}, please?"
    await _flag(database, text)
    start = time.perf_counter()
    folded = await fold(database, PROJECT, settings)
    async with database.read() as session:
        chosen = await push._next_items(session, PROJECT, settings.max_open_tasks)
    seconds = time.perf_counter() - start
    assert (folded, len(chosen)) == (1, ROOM), (folded, len(chosen))
    return seconds


async def _flag(database: Database, text: str) -> None:
    messages = [{"role": "user", "content": text}]
    exchange = Exchange(
        project=PROJECT, completion_id=new_id("c"), served="base", messages=messages, parameters={}, answers=["?"]
    )
    async with database.write() as session:
        session.add(exchange)
        await session.flush()
        session.add(Feedback(project=PROJECT, kind=FeedbackKind.FLAG, exchange_id=exchange.id, severity=0.3))


async def _database(folder: Path, items: int, say: Say) -> Database:
    path = folder / f"{items}.db"
    start = time.perf_counter()
    database = Database(f"sqlite+aiosqlite:///{path}")
    await database.create_tables()
    await _flag(database, "Who was first?")
    for _ in range(2):  # the second learns what the first made
        await fold(database, PROJECT, LEVELS["near"])
    await database.close()  # so that the writer below has the file to itself
    await asyncio.to_thread(_write_history, path, items)
    say(f"queue: {items:,} items, {path.stat().st_size / 1e9:.2f} GB in {time.perf_counter() - start:.0f} s")
    return Database(database.url)


def _write_history(path: Path, items: int) -> None:
    """One exchange, feedback, member, item and wording for each; all but the open tasks wait.

    Folding by `near` goes on from the last of them: older items that it has yet to learn are work of their own.
    """
    connection = sqlite3.connect(path, isolation_level=None)
    for pragma in ("journal_mode=OFF", "synchronous=OFF", "cache_size=-500000", "temp_store=MEMORY"):
        connection.execute(f"PRAGMA {pragma}")
    indexes = connection.execute(
        "SELECT name, sql FROM sqlite_master WHERE type = 'index' AND sql IS NOT NULL"
    ).fetchall()
    for name, _ in indexes:
        connection.execute(f"DROP INDEX {name}")
    connection.execute("BEGIN")
    connection.execute(
        "CREATE TEMP TABLE history AS WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < ?) "
        "SELECT i, printf('%011x%016x', i, abs(random())) AS id, 'sha256:' || lower(hex(randomblob(32))) AS digest, "
        "json_array(json_object('role', 'user', 'content', 'Question number ' || i || ' of somebody?')) AS messages "
        "FROM n",
        (items,),
    )
    for table, changed in _CHANGED.items():
        names = [row[1] for row in connection.execute(f"PRAGMA table_info({table})")]
        values = ", ".join(changed.get(name, f"first.{name}") for name in names)
        connection.execute(
            f"INSERT INTO {table} ({', '.join(names)}) SELECT {values} "  # noqa: S608  # names and values are ours
            f"FROM history, (SELECT * FROM {table} LIMIT 1) AS first",
            {"open_tasks": OPEN_TASKS - ROOM},
        )
    connection.execute("UPDATE fold_progress SET item_id = (SELECT max(id) FROM review_items)")
    connection.execute("COMMIT")
    for _, definition in indexes:
        connection.execute(definition)
    connection.close()


# What differs from the first row, which was stored by the product itself.
_CHANGED = {
    "exchanges": {"id": "'ex_' || history.id", "completion_id": "history.id", "messages": "history.messages"},
    "feedback": {"id": "'fb_' || history.id", "exchange_id": "'ex_' || history.id"},
    "review_items": {
        "id": "'it_' || history.id",
        "prompt_digest": "digest",
        "messages": "history.messages",
        "score": "round(0.3 + 0.5 * (abs(random()) % 10000) / 10000.0, 4)",
        "state": "iif(i <= :open_tasks, 'pushed', 'open')",
        "task_id": "iif(i <= :open_tasks, i, NULL)",
    },
    "item_members": {
        "feedback_id": "'fb_' || history.id",
        "item_id": "'it_' || history.id",
        "exchange_id": "'ex_' || history.id",
    },
    "item_wordings": {"prompt_digest": "digest", "item_digest": "digest", "near_key": "random()"},
}
