"""What POST /v1/feedback takes beyond one plain flag: stars, structured answers, many at once, gzip, dry runs."""

from __future__ import annotations

import dataclasses
import gzip
import json
import logging
import tracemalloc
from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest
from sqlalchemy import Connection, event, text

from labeling.answers import answer_text
from labeling.bulk import BulkInsert
from labeling.database import Database
from labeling.exchanges import record
from labeling.feedback import fold
from labeling.feedback_body import parse
from labeling.new_feedback import NewFeedback
from labeling.reporters import Reporters
from labeling.settings import LabelingSettings
from labeling.tables import Exchange, Feedback, FeedbackKind, ReporterSalt, ReviewItem
from service.capture import Captured, exchange_of
from service.feedback_form import decompressed
from service.problems import BodyTooLarge
from service.tables import IdempotentAnswer
from tests.running import PROJECT, Service, count, rows, service, settings_for

PATH = "/v1/feedback"
FLAG = {"kind": "flag", "exchange_id": "x"}
LINES = {"Content-Type": "application/x-ndjson"}
CALL = {"id": "c1", "type": "function", "function": {"name": "open", "arguments": '{"door": 2}'}}
MESSAGE = {"role": "assistant", "content": None, "tool_calls": [CALL]}


@pytest.fixture
async def running(database: Database) -> AsyncIterator[Service]:
    async with service(database, settings_for(["http://127.0.0.1:9"], max_body_bytes=500_000)) as found:
        yield found


@pytest.fixture
async def client(running: Service) -> AsyncIterator[httpx.AsyncClient]:
    async with await running.client("feedback") as found:
        yield found


def exchange(**columns: Any) -> Exchange:
    known = {"project": PROJECT, "completion_id": "c", "served": "base", "parameters": {}, "answers": ["Said"]}
    return Exchange(**{**known, "messages": [{"role": "user", "content": "Which door?"}], **columns})


@pytest.mark.parametrize(
    ("value", "stored"),
    [
        (True, True),
        (0.3, 0.3),
        ({"stars": 1, "of": 5}, 0.0),
        ({"stars": 4, "of": 5}, 0.75),
        ({"stars": 3.5}, 0.625),
        ({"stars": 2, "of": 2}, 1.0),
    ],
)
def test_ratings_become_one_scale(value: Any, stored: Any) -> None:
    """Thumbs, numbers and stars: the worst is 0, the best is 1."""
    assert parse({"kind": "rating", "exchange_id": "x", "value": value}).value == stored


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (MESSAGE, '[{"name":"open","arguments":"{\\"door\\": 2}"}]'),
        (
            {"role": "assistant", "content": [{"type": "text", "text": "Door "}, {"type": "text", "text": "2"}]},
            "Door 2",
        ),
        ({"doors": [2, None], "ä": True}, '{"doors": [2, null], "ä": true}'),
        ([], "[]"),
    ],
)
async def test_structured_corrections(running: Service, client: httpx.AsyncClient, value: Any, shown: str) -> None:
    """Kept as they were given; the labeller's draft is their text."""
    async with running.database.write() as session:
        await record(session, [exchange()])
    answer = await client.post(PATH, json={"kind": "correction", "exchange_id": "c", "value": value})
    assert answer.status_code == 202, answer.text
    (row,) = await rows(running.database, Feedback)
    assert row.value == value
    await fold(running.database, PROJECT, LabelingSettings())
    assert (await rows(running.database, ReviewItem))[0].prefilled == shown


async def test_structured_preferences_and_answers(running: Service, client: httpx.AsyncClient) -> None:
    """Two tool calls compared, about an answer that was a tool call itself, without any exchange."""
    other = {**MESSAGE, "tool_calls": [{**CALL, "function": {"name": "shut", "arguments": "{}"}}]}
    body = {
        "kind": "preference",
        "messages": [{"role": "user", "content": "q"}],
        "answer": other,
        "value": {"chosen": MESSAGE, "rejected": other},
    }
    assert (await client.post(PATH, json=body)).status_code == 202
    (row,) = await rows(running.database, Feedback)
    assert (row.answer, row.value) == ('[{"name":"shut","arguments":"{}"}]', body["value"])
    await fold(running.database, PROJECT, LabelingSettings())
    (item,) = await rows(running.database, ReviewItem)
    assert (item.answer, item.prefilled) == (row.answer, answer_text(MESSAGE))


def test_tool_calls_read_as_the_gateway_captures_them() -> None:
    """So that a correction that changes nothing is seen to change nothing."""
    response = json.dumps({"choices": [{"index": 0, "message": MESSAGE, "finish_reason": "tool_calls"}]}).encode()
    request = b'{"messages": [{"role": "user", "content": "q"}]}'
    captured = Captured(PROJECT, "chatcmpl-1", "base", request, response, False, False, 1.0, None, None, "k")
    assert exchange_of(captured).answers == [answer_text(MESSAGE)]


async def test_the_reporter_is_never_stored(
    running: Service, client: httpx.AsyncClient, caplog: pytest.LogCaptureFixture
) -> None:
    """One pseudonym a reporter and project, the same tomorrow; the name is in no table and no log line."""
    caplog.set_level(logging.DEBUG)
    name = "jane.doe@example.com"
    for number, reporter in enumerate((name, name, "john")):
        sent = {**FLAG, "reporter": reporter}
        assert (await client.post(PATH, json=sent, headers={"Idempotency-Key": f"k{number}"})).status_code == 202
    assert (await client.post(PATH, json={**FLAG, "reporter": name, "severity": "x"})).status_code == 422
    names = [row.reporter for row in await rows(running.database, Feedback)]
    assert len(set(names)) == 2
    again = Reporters()
    await again.load(running.database, [PROJECT, "another"])
    assert again.pseudonym(PROJECT, name) in names
    assert again.pseudonym("another", name) not in names
    assert name not in caplog.text
    async with running.database.read() as session:
        for table in ("feedback", "idempotent_answers", "reporter_salts"):
            stored = (await session.execute(text(f"SELECT * FROM {table}"))).all()
            assert stored
            assert name not in str(stored)


async def test_two_processes_make_one_salt(database: Database) -> None:
    """Whoever is second takes what the first one made."""
    first, second = Reporters(), Reporters()
    await first.load(database, [PROJECT])
    await second.load(database, [PROJECT])
    assert first.pseudonym(PROJECT, "u") == second.pseudonym(PROJECT, "u")
    assert await count(database, ReporterSalt) == 1


@pytest.mark.parametrize("as_lines", [False, True])
async def test_many_in_one_request(running: Service, client: httpx.AsyncClient, as_lines: bool) -> None:
    """Each for itself: 202 when all are accepted, 207 with each line's mistakes, 422 when none is."""
    async with running.database.write() as session:
        await record(session, [exchange()])

    async def send(*bodies: Any) -> httpx.Response:
        if not as_lines:
            return await client.post(PATH, json=bodies)
        return await client.post(PATH, content=b"\n".join(json.dumps(b).encode() for b in bodies), headers=LINES)

    good = {"kind": "flag", "exchange_id": "c"}
    whole = await send(good, FLAG)
    assert (whole.status_code, whole.json()["accepted"], whole.json()["refused"]) == (202, 2, 0)
    assert [(one["line"], one["linked"]) for one in whole.json()["results"]] == [(1, True), (2, False)]
    part = await send(good, {"kind": "praise", "exchange_id": "x"}, FLAG)
    assert (part.status_code, part.json()["accepted"], part.json()["refused"]) == (207, 2, 1)
    first, wrong, last = part.json()["results"]
    assert (wrong["line"], wrong["status"], wrong["errors"][0]["field"]) == (2, 422, "kind")
    none = await send({}, [])
    assert none.status_code == 422
    assert [line["line"] for line in none.json()["errors"]] == [1, 2]
    stored = {row.id for row in await rows(running.database, Feedback)}
    assert stored == {one["id"] for one in [*whole.json()["results"], first, last]}


async def test_a_broken_line_stops_no_other(running: Service, client: httpx.AsyncClient) -> None:
    """Blank lines are passed over and counted, the last one needs no end."""
    line = json.dumps(FLAG).encode()
    answer = await client.post(PATH, content=line + b'\n\n{"kind":\n' + line, headers=LINES)
    assert answer.status_code == 207
    found = [(one["line"], one.get("code")) for one in answer.json()["results"]]
    assert found == [(1, None), (3, "malformed_body"), (4, None)]
    assert await count(running.database, Feedback) == 2
    for empty in (b"", b"\n \n"):
        assert (await client.post(PATH, content=empty, headers=LINES)).json()["code"] == "no_feedback"
    assert (await client.post(PATH, json=[])).json()["code"] == "no_feedback"


async def test_many_with_a_key_are_stored_once(running: Service, client: httpx.AsyncClient) -> None:
    """The same request again gets the same answer, refused lines included; as one line it is another request."""
    once = {"Idempotency-Key": "k"}
    first = await client.post(PATH, json=[FLAG, {}, FLAG], headers=once)
    again = await client.post(PATH, json=[FLAG, {}, FLAG], headers=once)
    assert (first.status_code, first.json()["accepted"]) == (207, 2)
    assert (again.status_code, again.json()) == (207, first.json())
    other = await client.post(PATH, json=[FLAG], headers=once)
    assert (other.status_code, other.json()["code"]) == (422, "idempotency_mismatch")
    body, single = json.dumps(FLAG).encode(), {"Idempotency-Key": "one"}
    assert (await client.post(PATH, content=body, headers=single)).status_code == 202
    assert (await client.post(PATH, content=body, headers={**LINES, **single})).status_code == 422
    assert await count(running.database, Feedback) == 3
    assert await count(running.database, IdempotentAnswer) == 2


async def test_too_many_in_one_request(running: Service, client: httpx.AsyncClient) -> None:
    """Over the bound of one request: refused whole, and the answer stays small."""
    answer = await client.post(PATH, content=b"{}\n" * 10_001, headers=LINES)
    assert (answer.status_code, answer.json()["code"]) == (413, "too_many_rows")
    answer = await client.post(PATH, content=b"{}\n" * 9_000, headers=LINES)
    assert answer.status_code == 422
    assert len(answer.content) < 800_000
    more = json.dumps(FLAG).encode() + b"\n"
    answer = await client.post(PATH, content=more * 4_097, headers=LINES)
    assert (answer.status_code, answer.json()["code"]) == (413, "too_many_rows")
    assert await count(running.database, Feedback) == 0


async def test_many_as_large_as_the_queue(running: Service, client: httpx.AsyncClient) -> None:
    body = json.dumps(FLAG).encode() + b"\n"
    answer = await client.post(PATH, content=body * 4_096, headers=LINES)
    assert (answer.status_code, answer.json()["accepted"]) == (202, 4_096)
    assert await count(running.database, Feedback) == 4_096


async def test_gzip(running: Service, client: httpx.AsyncClient) -> None:
    """Decompressed up to the bound of plain bodies; several members are one body; the key counts what is inside."""
    packed, once = {"Content-Encoding": "gzip"}, {"Idempotency-Key": "k"}
    body = json.dumps(FLAG).encode()
    answer = await client.post(PATH, content=gzip.compress(body[:9]) + gzip.compress(body[9:]), headers=packed | once)
    assert answer.status_code == 202
    assert (await client.post(PATH, content=body, headers=once)).json() == answer.json()
    many = gzip.compress(b"\n".join([body] * 1_000))
    assert (await client.post(PATH, content=many, headers=packed | LINES)).json()["accepted"] == 1_000
    bomb = gzip.compress(b" " * 100_000_000)
    assert len(bomb) < 500_000
    refused = await client.post(PATH, content=bomb, headers=packed)
    assert (refused.status_code, refused.json()["code"]) == (413, "body_too_large")
    for broken in (body, gzip.compress(body)[:-4], b"", gzip.compress(body) + b"x"):
        refused = await client.post(PATH, content=broken, headers=packed)
        assert (refused.status_code, refused.json()["code"]) == (400, "malformed_body"), broken
    refused = await client.post(PATH, content=body, headers={"Content-Encoding": "br"})
    assert (refused.status_code, refused.json()["code"]) == (415, "unknown_encoding")
    assert await count(running.database, Feedback) == 1_001


async def test_dry_run_stores_nothing(running: Service, client: httpx.AsyncClient) -> None:
    """It finds every mistake and says whether the exchange is there, as the real one does; the key stays free."""
    async with running.database.write() as session:
        await record(session, [exchange(session_id="s", request_id="r")])
    once, query = {"Idempotency-Key": "k"}, {"dry_run": "true"}

    async def rehearsed(**about: Any) -> Any:
        return await client.post(PATH, json={"kind": "flag", **about}, headers=once, params=query)

    linked = [(await rehearsed(**{name: value})).json() for name, value in ABOUT]
    assert linked == [{"dry_run": True, "linked": one} for one in (True, True, False, False, False)]
    assert (await rehearsed(severity=2, exchange_id="c")).status_code == 422
    many = await client.post(PATH, json=[FLAG, {}], params=query)
    assert (many.status_code, many.json()["accepted"], many.json()["refused"]) == (200, 1, 1)
    assert many.json()["results"][0] == {"line": 1, "linked": False}
    assert (await client.post(PATH, json=FLAG, params={"dry_run": "maybe"})).json()["code"] == "bad_query"
    assert await count(running.database, Feedback) == 0
    assert (await client.post(PATH, json=FLAG, headers=once, params={"dry_run": "false"})).status_code == 202


ABOUT = [("exchange_id", "c"), ("request_id", "r"), ("session_id", "s"), ("exchange_id", "d"), ("session_id", "t")]


async def test_the_schema_shows_the_forms(client: httpx.AsyncClient) -> None:
    """One or many, lines, the dry run and the key."""
    operation = (await client.get("/schema")).json()["paths"][PATH]["post"]
    one, many = operation["requestBody"]["content"]["application/json"]["schema"]["oneOf"]
    assert many["items"] == one
    assert "stars" in one["properties"]["value"]["description"]
    assert "application/x-ndjson" in operation["requestBody"]["content"]
    assert {p["name"] for p in operation["parameters"]} == {"dry_run", "Idempotency-Key"}


def test_new_feedback_has_the_columns_of_its_table() -> None:
    """Each of its fields is one; what it lacks has a plain default in the table's model."""
    fields = {field.name for field in dataclasses.fields(NewFeedback)}
    columns = Feedback.model_fields
    assert fields <= set(columns)
    assert all(
        not columns[name].is_required() and columns[name].default_factory is None for name in set(columns) - fields
    )


def test_a_gzip_bomb_is_not_unpacked() -> None:
    """Refused before its 100 MB are in memory."""
    bomb = gzip.compress(b" " * 100_000_000)
    tracemalloc.start()
    with pytest.raises(BodyTooLarge):
        decompressed(bomb, "gzip", 10_000)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 1_000_000


async def test_rows_are_inserted_in_the_order_of_their_keys(database: Database) -> None:
    """Two processes that lock the same keys in different orders would end each other on PostgreSQL."""
    rows_given = [NewFeedback(PROJECT, FeedbackKind.FLAG, id=f"fb_{n}") for n in (3, 1, 2)]
    seen: list[Any] = []

    def work(connection: Connection) -> None:
        event.listen(connection, "before_cursor_execute", lambda *said: seen.append(said[3]))
        BulkInsert(Feedback)(connection, rows_given)

    await database.transact(work)
    flat = [value for given in seen[0] for value in (given if isinstance(given, list) else [given])]
    assert [value for value in flat if str(value).startswith("fb_")] == ["fb_1", "fb_2", "fb_3"]
    assert await count(database, Feedback) == 3


@pytest.mark.parametrize(
    "values",
    [
        pytest.param([1, True, 1], id="alike to Python, not in JSON"),
        pytest.param([True, True, True], id="all the same"),
        pytest.param([None, None, None], id="none at all"),
        pytest.param([None, {"stars": 4}, [0]], id="of every kind"),
        pytest.param([0], id="one row"),
    ],
)
async def test_each_row_keeps_its_own_value(values: list[Any], database: Database) -> None:
    """What rows have in common may be sent once, and only that."""
    given = [NewFeedback(PROJECT, FeedbackKind.RATING, value=value, comment="same") for value in values]
    await database.transact(lambda connection: BulkInsert(Feedback)(connection, given))
    stored = {row.id: row for row in await rows(database, Feedback)}
    assert [json.dumps(stored[row.id].value) for row in given] == [json.dumps(value) for value in values]
    assert {(row.comment, row.created_at) for row in stored.values()} == {("same", row.created_at) for row in given}
