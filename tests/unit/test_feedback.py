"""POST /v1/feedback and the review queue: acknowledged is on disk, once; flags fold into one item a prompt."""

from __future__ import annotations

import asyncio
import contextlib
import json
import uuid
from collections.abc import AsyncIterator
from datetime import timedelta
from typing import Any

import httpx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sqlalchemy import literal_column, update
from sqlmodel import col, select

from labeling.database import Database, new_id, now
from labeling.exchanges import record
from labeling.feedback import fold, is_held_out, prompt_digest
from labeling.feedback_body import InvalidFeedback, parse
from labeling.labeling_screen import task_data
from labeling.new_feedback import NewFeedback
from labeling.new_tasks import shown_comments
from labeling.reporters import Reporters
from labeling.selection import Signals, factors
from labeling.settings import LabelingSettings
from labeling.tables import (
    Exchange,
    Feedback,
    FeedbackKind,
    GoodAnswer,
    ItemMember,
    ItemState,
    Label,
    LabelState,
    ReviewItem,
    Verdict,
)
from service.idempotency import IdempotencyInFlight, Once, forget_answers
from service.ingest import IngestFull, IngestWriter, Submission, feedback_row
from service.metrics import Metrics
from service.tables import IdempotentAnswer
from tests.running import PROJECT, Service, count, rows, service, settings_for

PATH = "/v1/feedback"
SETTINGS = LabelingSettings(held_out_share=0)


@pytest.fixture
async def running(database: Database) -> AsyncIterator[Service]:
    async with service(database, settings_for(["http://127.0.0.1:9"], max_body_bytes=50_000)) as found:
        yield found


@pytest.fixture
async def client(running: Service) -> AsyncIterator[httpx.AsyncClient]:
    async with await running.client("feedback") as found:
        yield found


def exchange(text: str = "Who founded it?", answer: str = "Nobody", **columns: Any) -> Exchange:
    messages = [{"role": "user", "content": text}]
    known = {"project": PROJECT, "completion_id": new_id("c"), "served": "base", "messages": messages}
    return Exchange(**{**known, "parameters": {}, "answers": [answer], **columns})


def feedback(about: Exchange | None = None, **columns: Any) -> Feedback:
    known = {"project": PROJECT, "kind": FeedbackKind.FLAG, "completion_id": about.completion_id if about else None}
    return Feedback(**{**known, **columns})


async def store(database: Database, *stored: Any) -> None:
    async with database.write() as session:
        for row in stored:
            if isinstance(row, Exchange):
                await record(session, [row])
            else:
                session.add(row)


async def test_acknowledged_feedback_is_stored(running: Service, client: httpx.AsyncClient) -> None:
    """202 with an id; the row holds all that was said, linked to the exchange that is there already."""
    known = exchange()
    await store(running.database, known)
    body = {
        "exchange_id": known.completion_id,
        "kind": "flag",
        "reasons": ["wrong"],
        "severity": 0.9,
        "comment": "no",
        "reporter": "u1",
        "tags": {"a": "b"},
    }
    answer = await client.post(PATH, json=body)
    assert answer.status_code == 202
    assert answer.json()["linked"] is True
    (row,) = await rows(running.database, Feedback)
    assert (row.id, row.exchange_id, row.project) == (answer.json()["id"], known.id, PROJECT)
    assert (row.reasons, row.severity, row.tags) == (["wrong"], 0.9, {"a": "b"})


async def test_feedback_may_come_first(running: Service, client: httpx.AsyncClient) -> None:
    """By completion id or request id: accepted unlinked, linked when its exchange arrives."""
    late = exchange(request_id="r1")
    by_id = await client.post(PATH, json={"exchange_id": late.completion_id, "kind": "flag"})
    by_request = await client.post(PATH, json={"request_id": "r1", "kind": "flag"})
    other = await client.post(PATH, json={"exchange_id": "never", "kind": "flag"})
    assert [a.json()["linked"] for a in (by_id, by_request, other)] == [False] * 3
    await store(running.database, late)
    found = {row.id: row.exchange_id for row in await rows(running.database, Feedback)}
    assert found == {by_id.json()["id"]: late.id, by_request.json()["id"]: late.id, other.json()["id"]: None}


async def test_session_means_its_last_answer_before(database: Database) -> None:
    """Feedback by session is linked when folded, to the newest exchange that is older than it."""
    start = now() - timedelta(minutes=5)
    said = [exchange(str(i), session_id="s", created_at=start + timedelta(minutes=i)) for i in range(4)]
    await store(database, *said, feedback(session_id="s", created_at=start + timedelta(minutes=2, seconds=1)))
    assert await fold(database, PROJECT, SETTINGS) == 1
    assert (await rows(database, Feedback))[0].exchange_id == said[2].id


async def test_every_mistake_is_listed(client: httpx.AsyncClient) -> None:
    """One problem names all wrong fields, those of the combination too."""
    answer = await client.post(PATH, json={"kind": "rating", "value": 7, "severity": "x", "foo": 1, "answer": "a"})
    assert answer.status_code == 422
    assert answer.headers["content-type"] == "application/problem+json"
    assert {error["field"] for error in answer.json()["errors"]} == {"value", "severity", "foo", "messages"}


WRONG_BODIES: list[Any] = [
    {"kind": "praise", "exchange_id": "x"},
    {"kind": "flag"},
    {"kind": "flag", "exchange_id": ""},
    {"kind": "flag", "exchange_id": "x", "value": True},
    {"kind": "comment", "exchange_id": "x"},
    {"kind": "rating", "exchange_id": "x"},
    {"kind": "rating", "exchange_id": "x", "value": "good"},
    {"kind": "correction", "exchange_id": "x", "value": " "},
    {"kind": "preference", "exchange_id": "x", "value": {"chosen": "a"}},
    {"kind": "preference", "exchange_id": "x", "value": {"chosen": "a", "rejected": "a"}},
    {"kind": "preference", "exchange_id": "x", "value": {"chosen": {"a": 1}, "rejected": '{"a": 1}'}},
    {"kind": "preference", "exchange_id": "x", "value": {"chosen": "a", "rejected": 7}},
    {"kind": "rating", "exchange_id": "x", "value": {"stars": 0}},
    {"kind": "rating", "exchange_id": "x", "value": {"stars": 6}},
    {"kind": "rating", "exchange_id": "x", "value": {"stars": True}},
    {"kind": "rating", "exchange_id": "x", "value": {"stars": 1, "of": 1}},
    {"kind": "rating", "exchange_id": "x", "value": {"stars": 2, "of": 2.5}},
    {"kind": "rating", "exchange_id": "x", "value": {"stars": 2, "out_of": 5}},
    {"kind": "correction", "exchange_id": "x", "value": 7},
    {"kind": "correction", "exchange_id": "x", "value": {"role": "user", "tool_calls": []}},
    {"kind": "correction", "exchange_id": "x", "value": {"role": "assistant", "content": ""}},
    {"kind": "correction", "exchange_id": "x", "value": {"role": "assistant", "content": [{"type": "image_url"}]}},
    {"kind": "correction", "exchange_id": "x", "value": {"tool_calls": [{"function": {"name": "f"}}]}},
    {
        "kind": "correction",
        "exchange_id": "x",
        "value": {"tool_calls": [{"function": {"name": "f", "arguments": "{"}}]},
    },
    {"kind": "flag", "messages": [{"role": "user", "content": "q"}], "answer": 7},
    {"kind": "flag", "exchange_id": "nul\0"},
    {"kind": "flag", "messages": [{"role": "user", "content": "\0"}], "answer": "a"},
    {"kind": "flag", "messages": [{"content": "no role"}], "answer": "a"},
    {"kind": "flag", "exchange_id": "x", "tags": {"a": 1}},
    {"kind": "flag", "exchange_id": "x", "choice": -1},
    {"kind": "flag", "exchange_id": "x", "project": "another"},
    ["flag"],
    "flag",
]


async def test_wrong_bodies(running: Service, client: httpx.AsyncClient) -> None:
    """Each is refused with the field at fault, and stores nothing."""
    for body in WRONG_BODIES:
        answer = await client.post(PATH, json=body)
        assert (answer.status_code, bool(answer.json().get("errors"))) == (422, True), body
    assert await count(running.database, Feedback) == 0


async def test_malformed_bodies(client: httpx.AsyncClient) -> None:
    """No JSON in UTF-8: 400, with the cure."""
    for body in (b"", b"{", b'{"kind":"\xff"}', b'{"kind":"\\ud800"}', b"[" * 40_000):
        answer = await client.post(PATH, content=body)
        assert (answer.status_code, answer.json()["code"]) == (400, "malformed_body"), body[:20]


async def test_huge_body(client: httpx.AsyncClient) -> None:
    answer = await client.post(PATH, content=b"a" * 60_000)
    assert (answer.status_code, answer.headers["content-type"]) == (413, "application/problem+json")


JSON = st.recursive(
    st.none() | st.booleans() | st.floats() | st.text(), lambda x: st.lists(x) | st.dictionaries(st.text(), x)
)


@settings(max_examples=50, deadline=None)
@given(JSON)
def test_any_json_is_parsed_or_refused(value: Any) -> None:
    """No input gets past the form with another error than the one that lists its mistakes."""
    for body in (value, {"kind": "preference", "exchange_id": value, "value": value, "messages": value, "tags": value}):
        with contextlib.suppress(InvalidFeedback):
            parse(body)


async def test_project_of_the_key_or_of_the_body(running: Service) -> None:
    """They must agree; with one project only, a key of all projects needs to name none."""
    async with await running.client("feedback", project=None) as everyone:
        assert (await everyone.post(PATH, json={"kind": "flag", "exchange_id": "x"})).status_code == 202
    async with await running.client("feedback", project="another") as other:
        wrong = await other.post(PATH, json={"kind": "flag", "exchange_id": "x", "project": PROJECT})
        assert (wrong.status_code, wrong.json()["code"]) == (403, "out_of_scope")


async def test_idempotency_key(running: Service, client: httpx.AsyncClient) -> None:
    """Same body, same answer; another body is refused; another API key is another namespace; one row each."""
    body = {"kind": "flag", "exchange_id": "x"}
    once = {"Idempotency-Key": "k1"}
    first = await client.post(PATH, json=body, headers=once)
    again = await client.post(PATH, json=body, headers=once)
    assert (again.status_code, again.json()) == (202, first.json())
    other = await client.post(PATH, json={**body, "severity": 1}, headers=once)
    assert (other.status_code, other.json()["code"]) == (422, "idempotency_mismatch")
    async with await running.client("feedback") as colleague:
        assert (await colleague.post(PATH, json=body, headers=once)).json()["id"] != first.json()["id"]
    assert (await client.post(PATH, json=body, headers={"Idempotency-Key": "k" * 300})).status_code == 422
    assert await count(running.database, Feedback) == 2


async def test_old_idempotency_keys_are_forgotten(running: Service, client: httpx.AsyncClient) -> None:
    """After two days a key is free again; a younger one is remembered."""
    body, once = {"kind": "flag", "exchange_id": "x"}, {"Idempotency-Key": "k1"}
    first = await client.post(PATH, json=body, headers=once)
    await forget_answers(running.database)
    assert (await client.post(PATH, json=body, headers=once)).json() == first.json()
    async with running.database.write() as session:
        (row,) = (await session.execute(select(IdempotentAnswer))).scalars()
        row.created_at = now() - timedelta(days=3)
    await forget_answers(running.database)
    assert (await client.post(PATH, json=body, headers=once)).json()["id"] != first.json()["id"]


async def test_one_key_a_hundred_times_at_once(running: Service, client: httpx.AsyncClient) -> None:
    """Whatever the timing: one row, every 202 names it, the others are told to wait."""
    body = {"kind": "flag", "exchange_id": "x"}
    sent = [client.post(PATH, json=body, headers={"Idempotency-Key": "k"}) for _ in range(100)]
    answers = await asyncio.gather(*sent)
    accepted = [answer.json()["id"] for answer in answers if answer.status_code == 202]
    assert {answer.status_code for answer in answers} <= {202, 409}
    assert len(set(accepted)) == 1
    assert [row.id for row in await rows(running.database, Feedback)] == accepted[:1]


async def test_a_sender_that_hangs_up_keeps_its_key(database: Database) -> None:
    """Its repeat must not join the same commit as another row: it is told to wait, then gets the first answer."""
    writer = IngestWriter(database, 10, Metrics())

    def submission() -> Submission:
        return Submission([NewFeedback(PROJECT, FeedbackKind.FLAG, session_id="s")], Once("key", "name", "digest"))

    first = asyncio.create_task(writer.submit(submission()))
    await asyncio.sleep(0)
    first.cancel()
    with pytest.raises(asyncio.CancelledError):
        await first
    with pytest.raises(IdempotencyInFlight):
        await writer.submit(submission())
    run = asyncio.create_task(writer.run())
    await writer.drained()
    answer = await writer.submit(submission())
    assert [row.id for row in await rows(database, Feedback)] == [answer.body["id"]]
    run.cancel()


async def test_many_at_once_share_commits(running: Service, client: httpx.AsyncClient) -> None:
    """300 at the same time are all stored, in fewer transactions."""
    answers = await asyncio.gather(
        *(client.post(PATH, json={"kind": "flag", "exchange_id": str(i)}) for i in range(300))
    )
    assert {answer.status_code for answer in answers} == {202}
    stored = await rows(running.database, Feedback)
    assert {row.id for row in stored} == {answer.json()["id"] for answer in answers}
    commits = running.state.metrics.registry.get_sample_value("nightschool_feedback_commit_rows_count")
    assert commits is not None
    assert commits < 100


async def test_full_queue_answers_at_once(database: Database) -> None:
    """Beyond the limit nobody waits: refused, to be sent again."""
    writer = IngestWriter(database, 2, Metrics())
    waiting = [
        asyncio.create_task(writer.submit(Submission([NewFeedback(PROJECT, FeedbackKind.FLAG, session_id="s")])))
        for _ in range(2)
    ]
    await asyncio.sleep(0)
    with pytest.raises(IngestFull):
        await writer.submit(Submission([NewFeedback(PROJECT, FeedbackKind.FLAG, session_id="s")]))
    run = asyncio.create_task(writer.run())
    assert len(await asyncio.gather(*waiting)) == 2
    run.cancel()
    assert await count(database, Feedback) == 2


async def test_status_shows_the_way_through_the_queue(running: Service, client: httpx.AsyncClient) -> None:
    """From stored over folded to its item's state; other projects' feedback does not exist."""
    known = exchange()
    await store(running.database, known)
    found = (await client.post(PATH, json={"exchange_id": known.completion_id, "kind": "flag"})).json()["id"]
    assert (await client.get(f"{PATH}/{found}")).json()["item"] is None
    await fold(running.database, PROJECT, SETTINGS)
    status = (await client.get(f"{PATH}/{found}")).json()
    assert (status["linked"], status["item"]["state"]) == (True, "open")
    async with await running.client("feedback", project="another") as other:
        assert (await other.get(f"{PATH}/{found}")).status_code == 404
    assert (await client.get(f"{PATH}/unknown")).json()["code"] == "unknown_feedback"


async def test_same_prompt_folds_into_one_item(database: Database) -> None:
    """Case, width and white space aside, one prompt is one problem: counted, newest answer, merged reasons, once."""
    first = exchange("Who  founded ACME?", "Bob")
    second = exchange("who founded acme?", "Eve")
    flags = [
        feedback(first, reasons=["wrong"], severity=0.2, created_at=now() - timedelta(seconds=9)),
        feedback(second, reasons=["rude", "wrong"], severity=0.8),
        feedback(exchange_id=None, messages=[{"role": "user", "content": "ＷＨＯ founded acme? "}], answer="Zed"),
    ]
    await store(database, first, second, exchange("Another?"), *flags)
    assert await fold(database, PROJECT, SETTINGS) == 3
    assert await fold(database, PROJECT, SETTINGS) == 0
    (item,) = await rows(database, ReviewItem)
    assert (item.count, item.severity, item.answer, item.reasons) == (3, 0.8, "Zed", ["wrong", "rude"])
    assert item.factors == factors(Signals(0.8, 3, novelty=1.0))
    assert await count(database, ItemMember) == 3


async def test_folding_waits_for_the_exchange(database: Database) -> None:
    """A flag of an exchange that has not arrived stays; the same fold finds it later."""
    late = exchange()
    await store(database, feedback(late))
    assert await fold(database, PROJECT, SETTINGS) == 0
    await store(database, late)
    assert await fold(database, PROJECT, SETTINGS) == 1


async def test_what_each_kind_becomes(database: Database) -> None:
    """Corrections and preferences prefill, low ratings ask for review, good ones are kept, comments only stay."""
    cases: list[tuple[str, str, Any]] = [
        ("correct me", "correction", "Right"),
        ("prefer", "preference", {"chosen": "Good", "rejected": "Bad"}),
        ("low", "rating", 0.2),
        ("down", "rating", False),
        ("up", "rating", True),
        ("comment", "comment", None),
    ]
    for text, kind, value in cases:
        known = exchange(text, "Said")
        tags = {"must_contain": "Said|Spoke\nword"} if text == "up" else {}
        await store(database, known, feedback(known, kind=FeedbackKind(kind), value=value, tags=tags, comment="c"))
    assert await fold(database, PROJECT, SETTINGS) == len(cases)
    items = {item.messages[0]["content"]: item for item in await rows(database, ReviewItem)}
    assert set(items) == {"correct me", "prefer", "low", "down"}
    assert (items["correct me"].answer, items["correct me"].prefilled) == ("Said", "Right")
    assert (items["prefer"].answer, items["prefer"].prefilled) == ("Bad", "Good")
    (good,) = await rows(database, GoodAnswer)
    assert (good.messages[0]["content"], good.answer, good.must_contain) == ("up", "Said", ["Said|Spoke", "word"])


async def test_pushed_item_keeps_what_its_labeller_sees(database: Database) -> None:
    """After the task went out a new flag counts, and changes neither the answer nor the offered correction."""
    first, second = exchange(answer="Old"), exchange(answer="New")
    await store(database, first, feedback(first))
    await fold(database, PROJECT, SETTINGS)
    async with database.write() as session:
        item = await session.get(ReviewItem, (await rows(database, ReviewItem))[0].id)
        assert item is not None
        item.state = ItemState.PUSHED
    await store(database, second, feedback(second, kind=FeedbackKind.CORRECTION, value="Offer"))
    await fold(database, PROJECT, SETTINGS)
    (item,) = await rows(database, ReviewItem)
    assert (item.count, item.answer, item.prefilled) == (2, "Old", None)


@pytest.mark.parametrize(("served", "minutes", "rounds"), [("bot@v2", 1, 2), ("base", 1, 1), ("bot@v2", -1, 1)])
async def test_next_round_only_for_a_new_mistake(database: Database, served: str, minutes: int, rounds: int) -> None:
    """Labelled, then wrong again under another adapter: a new item. The old adapter's mistake is known already."""
    first = exchange()
    await store(database, first, feedback(first))
    await fold(database, PROJECT, LabelingSettings(held_out_share=0.999999))
    async with database.write() as session:
        item = await session.get(ReviewItem, (await rows(database, ReviewItem))[0].id)
        assert item is not None
        assert item.held_out
        item.state = ItemState.LABELLED
        label = Label(
            item_id=item.id,
            project=PROJECT,
            messages=[],
            state=LabelState.ACCEPTED,
            verdict=Verdict.WRONG,
            flagged_answer="",
            accepted_at=now(),
        )
        session.add(label)
    again = exchange(served=served, created_at=now() + timedelta(minutes=minutes))
    await store(database, again, feedback(again))
    await fold(database, PROJECT, SETTINGS)
    items = sorted(await rows(database, ReviewItem), key=lambda item: item.round)
    assert [item.round for item in items] == list(range(1, rounds + 1))
    assert all(item.held_out for item in items), "a prompt once held out is never trained on"
    assert items[-1].count == 3 - rounds


async def test_folds_at_the_same_time_count_once(database: Database) -> None:
    """Worker and night may fold together: each feedback enters the queue once."""
    known = [exchange(f"q{i % 5}") for i in range(40)]
    await store(database, *(feedback(one) for one in known), *known)
    await asyncio.gather(*(count(database, Feedback) for _ in range(4)))  # four open connections: they start together
    folded = await asyncio.gather(*(fold(database, PROJECT, SETTINGS) for _ in range(4)))
    assert sum(folded) == 40
    assert sorted(item.count for item in await rows(database, ReviewItem)) == [8] * 5


def test_held_out_share_is_what_was_asked_for() -> None:
    """By hash: the same seed always the same side, about the share of many."""
    marks = [is_held_out(f"ex_{i}", 0.2) for i in range(5000)]
    assert marks == [is_held_out(f"ex_{i}", 0.2) for i in range(5000)]
    assert 0.17 < sum(marks) / 5000 < 0.23
    assert not any(is_held_out(f"ex_{i}", 0.0) for i in range(100))


def test_prompt_digest_tells_prompts_apart() -> None:
    """Role and every message count; spelling variants of one text do not."""
    one = [{"role": "user", "content": "Straße  \n?"}]
    assert prompt_digest(one) == prompt_digest([{"role": "user", "content": "STRASSE ?"}])
    assert prompt_digest(one) == prompt_digest([{"role": "user", "content": [{"type": "text", "text": "strasse ?"}]}])
    assert prompt_digest(one) != prompt_digest([{"role": "system", "content": "Straße ?"}])
    assert prompt_digest(one) != prompt_digest([{"role": "system", "content": "be kind"}, *one])


async def test_a_body_nested_without_end_is_malformed(running: Service, client: httpx.AsyncClient) -> None:
    """Not an error of ours."""
    deep = b"[" * 600 + b"]" * 600
    body = b'{"kind":"flag","answer":"a","messages":[{"role":"user","content":' + deep + b"}]}"
    answer = await client.post(PATH, content=body)
    assert (answer.status_code, answer.json()["code"]) == (400, "malformed_body")


async def test_comments_reach_the_labeller(database: Database) -> None:
    """That of a flag, and one that came alone about the same prompt."""
    asked = {"messages": [{"role": "user", "content": "When?"}], "answer": "At five."}
    for kind, comment in (("flag", "We close at six."), ("comment", "Ask the shop."), ("flag", None)):
        body = parse({**asked, "kind": kind, **({"comment": comment} if comment else {})})
        async with database.write() as session:
            session.add(feedback_row(body, PROJECT, "k", Reporters()))
        await fold(database, PROJECT, SETTINGS)
    (item,) = await rows(database, ReviewItem)
    assert item.count == 2, "a comment alone is no flag"
    said = await shown_comments(database, [item.id])
    assert said == {item.id: ["Ask the shop.", "We close at six."]}
    assert "“Ask the shop.”\n“We close at six.”" in task_data(item, said[item.id])["why"]


async def test_one_that_cannot_be_folded_stops_no_other(database: Database) -> None:
    """Its exchange, stored by hand, is nested deeper than Python reads; what came before and after folds."""
    bad, good = exchange("Deep?"), exchange("Flat?")
    await store(database, bad, good, feedback(bad), feedback(good))
    deep = "[" * 2_000 + "]" * 2_000
    async with database.write() as session:
        column: Any = literal_column(f"'{deep}'")  # the column's own type would not write it
        await session.execute(update(Exchange).where(col(Exchange.id) == bad.id).values(parameters=column))
    assert await fold(database, PROJECT, SETTINGS) == 1
    assert [item.messages[-1]["content"] for item in await rows(database, ReviewItem)] == ["Flat?"]
    assert await fold(database, PROJECT, SETTINGS) == 0, "left out once, not asked again for ever"


async def test_thousands_of_mistakes_are_named_briefly(client: httpx.AsyncClient) -> None:
    """An answer a thousand times its question would freeze the gateway."""
    body = b'{"kind":"flag","answer":"a","messages":[' + b",".join([b"{}"] * 4_000) + b"]}"
    answer = await client.post(PATH, content=body)
    assert (answer.status_code, answer.json()["code"]) == (422, "invalid_feedback")
    assert len(answer.content) < 10_000
    assert [mistake["field"] for mistake in answer.json()["errors"]] == ["messages"]
    few = [{"role": 1, "content": 2}] * 400
    answer = await client.post(PATH, json={"kind": "flag", "answer": "a", "messages": few})
    assert len(answer.json()["errors"]) == 100


async def test_a_choice_that_is_not_there_makes_nothing(database: Database) -> None:
    """Neither an item with an empty answer nor an empty good answer; why stands with the feedback."""
    said = exchange()
    liked = feedback(said, kind=FeedbackKind.RATING, value=True, choice=7)
    await store(database, said, feedback(said, choice=1), liked)
    await fold(database, PROJECT, LabelingSettings())
    assert {row.entry for row in await rows(database, Feedback)} == {"left out: no such choice"}
    assert await rows(database, ReviewItem) == []
    assert await rows(database, GoodAnswer) == []


async def test_two_answers_to_choose_from_stay_together(database: Database) -> None:
    """A flag of the same prompt is counted, and takes neither away."""
    said = exchange(answer="Nobody")
    pair = feedback(said, kind=FeedbackKind.PREFERENCE, value={"chosen": "Ann", "rejected": "Nobody"})
    await store(database, said, pair)
    await fold(database, PROJECT, LabelingSettings())
    again = exchange(answer="Bob")
    await store(database, again, feedback(again))
    await fold(database, PROJECT, LabelingSettings())
    (item,) = await rows(database, ReviewItem)
    assert (item.count, item.answer, item.other_answer) == (2, "Nobody", "Ann")


async def test_a_comment_before_the_flag_is_shown(database: Database) -> None:
    """To whoever labels it, once the exchange is a problem."""
    said = exchange()
    await store(database, said, feedback(said, kind=FeedbackKind.COMMENT, comment="We close at six."))
    await fold(database, PROJECT, LabelingSettings())
    await store(database, feedback(said))
    await fold(database, PROJECT, LabelingSettings())
    assert {member.comment for member in await rows(database, ItemMember)} == {"We close at six.", None}
    (item,) = await rows(database, ReviewItem)
    assert item.count == 1


async def test_numbers_and_depths_that_cannot_be_kept_are_mistakes(running: Service, client: httpx.AsyncClient) -> None:
    """Of their line alone: none is an error of ours, and the others are stored."""
    huge, deep = "9" * 400, "[" * 70 + "]" * 70
    lines = [
        '{"kind": "flag", "exchange_id": "x"}',
        json.dumps({"kind": "rating", "exchange_id": "x", "value": {"stars": int(huge)}}),
        json.dumps({"kind": "rating", "exchange_id": "x", "value": int(huge)}),
        f'{{"kind": "correction", "exchange_id": "x", "value": {deep}}}',
        '{"kind": "correction", "exchange_id": "x", "value": {"role": "assistant", "content": "  "}}',
        '{"kind": "preference", "exchange_id": "x", "value": {"chosen": "a", "rejected": "a "}}',
    ]
    answer = await client.post(PATH, content="\n".join(lines), headers={"Content-Type": "application/x-ndjson"})
    told = answer.json()
    assert (answer.status_code, told["accepted"], told["refused"]) == (207, 1, 5)
    assert await count(running.database, Feedback) == 1
    metric = {"inference_id": str(uuid.uuid4()), "metric_name": "m", "value": int(huge)}
    assert (await client.post("/feedback", content=json.dumps(metric))).status_code < 500
