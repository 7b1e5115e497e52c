"""A round of folding costs what there is to do: feedback that never links or is held back is not read again."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import timedelta
from typing import Any

import pytest
from sqlalchemy import event, text, update
from sqlmodel import SQLModel, col, select

from labeling import exchanges
from labeling.database import Database, new_id, now
from labeling.exchanges import LOOK_AGAIN, link_due, record
from labeling.feedback import fold
from labeling.settings import LabelingSettings
from labeling.tables import Exchange, Feedback, FeedbackKind
from service.transfer.own_rows import table_of
from tests.running import PROJECT, rows
from tests.unit.test_feedback import exchange, feedback, store

SETTINGS = LabelingSettings(held_out_share=0)
CAPPED = LabelingSettings.model_validate({"held_out_share": 0, "entry": {"project_per_day": 3}})
DAY = timedelta(days=1)


async def backlog(database: Database, each: int) -> None:
    """`each` that name a completion, a request and a session that never come, and `each` that a cap holds back."""
    since = now() - DAY
    loose = [
        {"id": new_id("fb"), "created_at": since, "link_at": None, "link_tries": 2, name: f"never {number}"}
        for number in range(each)
        for name in ("completion_id", "request_id", "session_id")
    ]
    held = [
        {"id": new_id("fb"), "created_at": since, "link_at": None, "messages": MESSAGES, "answer": "So.", **HELD}
        for _ in range(each)
    ]
    async with database.write() as session:
        session.add_all(Feedback(project=PROJECT, kind=FeedbackKind.FLAG, **row) for row in [*loose, *held])


MESSAGES = [{"role": "user", "content": "Held?"}]
HELD: dict[str, Any] = {"entry": "held back: project", "held_until": now() + DAY}


@asynccontextmanager
async def steps(database: Database) -> AsyncIterator[list[int]]:
    """Of SQLite's machine while inside, in tens: each row that a statement reads or passes over costs some."""
    done = [0]

    def step() -> int:
        done[0] += 1
        return 0

    async def switch(on: bool) -> None:
        await database.engine.dispose()  # so that every connection is a new one
        (event.listen if on else event.remove)(database.engine.sync_engine, "connect", connected)

    def connected(connection: Any, _record: object) -> None:
        connection.run_async(lambda driver: driver.set_progress_handler(step, 10))

    await switch(True)
    yield done
    await switch(False)


async def cost(database: Database) -> int:
    """Of three rounds: one with a new flag, one with a flag by session and its exchange, one with nothing."""
    async with steps(database) as done:
        for number in range(2):
            known = exchange(f"New {number}?", session_id=f"s{new_id('s')}")
            about = feedback(known) if number else feedback(session_id=known.session_id)
            await store(database, known, about)
            assert await fold(database, PROJECT, SETTINGS) == 1
        assert await fold(database, PROJECT, SETTINGS) == 0
    return done[0]


async def test_a_round_costs_the_same_however_much_waits(tmp_path: Any) -> None:
    """Statements read the same number of rows with five of each kind waiting and with five hundred."""
    seen = []
    for each in (5, 500):
        database = Database(f"sqlite+aiosqlite:///{tmp_path}/{each}.db")
        await database.create_tables()
        await backlog(database, each)
        seen.append(await cost(database))
        await database.close()
    few, many = seen
    assert 0 < few < 20_000
    assert many < 1.2 * few, (few, many)


async def test_postgresql_has_an_index_for_each(database: Database) -> None:
    """What is ready, what is due, what waits for its exchange: each query has its own index of some rows."""
    if database.is_sqlite:
        pytest.skip("its steps are counted above")
    statements: list[tuple[str, Any]] = []
    event.listen(database.engine.sync_engine, "before_cursor_execute", lambda *call: statements.append(call[2:4]))
    await store(database, exchange(session_id="s"), feedback(session_id="s"))
    await fold(database, PROJECT, SETTINGS)
    found: dict[str, str] = {}
    async with database.engine.begin() as connection:
        await connection.execute(text("SET LOCAL enable_seqscan = off"))
        for index, mark in MARKS.items():
            statement, values = next(call for call in statements if mark in call[0])
            found[index] = str((await connection.exec_driver_sql(f"EXPLAIN {statement}", values)).all())
    assert all(index in plan for index, plan in found.items()), found


MARKS = {
    "ix_feedback_ready": "held_until IS NULL AND (exchange_id",
    "ix_feedback_held": "held_until IS NOT NULL",
    "ix_feedback_link": "FOR UPDATE SKIP LOCKED",
}


async def test_what_may_have_been_missed_is_looked_for_again(database: Database) -> None:
    """Stored at the same moment as its exchange, in another transaction: neither saw the other."""
    late = exchange()
    await store(database, feedback(late), feedback(request_id="r1"))
    await fold(database, PROJECT, SETTINGS)
    twin = exchange("And now?", request_id="r1")
    async with database.write() as session:
        session.add_all([late, twin])  # past `record`, which links
    await fold(database, PROJECT, SETTINGS)
    assert {row.exchange_id for row in await rows(database, Feedback)} == {None}
    await move(database, Feedback, link_at=col(Feedback.link_at), by=LOOK_AGAIN)
    assert await fold(database, PROJECT, SETTINGS) == 2
    assert {row.exchange_id for row in await rows(database, Feedback)} == {late.id, twin.id}


async def move(database: Database, model: type[SQLModel], by: timedelta, **columns: Any) -> None:
    async with database.write() as session:
        for row in (await session.execute(select(model))).scalars().all():
            for name in columns:
                at = getattr(row, name)
                setattr(row, name, None if at is None else at - by)


async def test_after_that_it_rests_until_its_exchange_comes(database: Database) -> None:
    """Days later, by completion, request and session; a session's exchange from after the feedback wakes nothing."""
    await store(database, *(feedback(None, **{name: "x"}) for name in ("completion_id", "request_id", "session_id")))
    for _ in range(2):
        await fold(database, PROJECT, SETTINGS)
        await move(database, Feedback, link_at=True, by=LOOK_AGAIN)
    await fold(database, PROJECT, SETTINGS)
    assert {row.link_at for row in await rows(database, Feedback)} == {None}
    await store(database, exchange(session_id="x"))
    assert {row.link_at for row in await rows(database, Feedback)} == {None}
    late = exchange(completion_id="x", request_id="x", session_id="x", created_at=now() - DAY)
    older = exchange("Before?", session_id="x", created_at=now() - 2 * DAY)
    await store(database, late, older)
    assert await fold(database, PROJECT, SETTINGS) == 3
    assert {row.exchange_id for row in await rows(database, Feedback)} == {late.id}


async def test_held_back_feedback_is_visited_when_its_day_comes(database: Database) -> None:
    """Not before, then first, and all of it that has room, in more than one batch."""
    since = now() - DAY
    for number in range(8):
        known = exchange(f"Q{number}?", created_at=since)
        await store(database, known, feedback(known, created_at=since + timedelta(minutes=number)))
    assert await fold(database, PROJECT, CAPPED) == 3
    assert await fold(database, PROJECT, SETTINGS) == 0, "held is held, whatever the settings are by now"
    await move(database, Feedback, held_until=True, by=2 * DAY)
    assert await fold(database, PROJECT, SETTINGS) == 5


async def test_links_are_made_in_small_transactions(database: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    """However many came unlinked at once: the writer is free in between."""
    monkeypatch.setattr(exchanges, "ROWS_PER_STATEMENT", 4)
    known = exchange(session_id="s", created_at=now() - DAY)
    await store(database, known, *(feedback(session_id="s") for _ in range(10)))
    transactions = 0
    write = database.write

    def counted() -> Any:
        nonlocal transactions
        transactions += 1
        return write()

    monkeypatch.setattr(database, "write", counted)
    await link_due(database, PROJECT)
    assert transactions >= 3
    assert {row.exchange_id for row in await rows(database, Feedback)} == {known.id}


def test_what_an_installation_notes_for_itself_is_marked() -> None:
    """Not exported: another installation looks for the exchange itself."""
    marked = {column.name for column in table_of(Feedback).columns if column.info}
    assert marked == {"link_at", "link_tries"}
    assert not [column.name for column in table_of(Exchange).columns if column.info]


async def test_exchanges_of_many_sessions_wake_only_theirs(database: Database) -> None:
    """A batch of the gateway's, most of its sessions without feedback."""
    await store(database, *(feedback(session_id=f"s{number}") for number in range(6)))
    for _ in range(2):
        await fold(database, PROJECT, SETTINGS)
        await move(database, Feedback, link_at=True, by=LOOK_AGAIN)
    await fold(database, PROJECT, SETTINGS)
    earlier = now() - DAY
    async with database.write() as session:
        await record(session, [exchange(session_id=f"s{number}", created_at=earlier) for number in range(4, 40)])
    awake = {row.session_id for row in await rows(database, Feedback) if row.link_at is not None}
    assert awake == {"s4", "s5"}


async def test_an_answer_of_its_own_needs_no_look(database: Database) -> None:
    async with database.write() as session:
        session.add(feedback(messages=MESSAGES, answer="So."))
        await session.execute(update(Feedback).values(link_at=None))
    assert await fold(database, PROJECT, SETTINGS) == 1
