"""Rows of other tools become ours: what they name, when they were, what they say; the rest is refused with a reason."""

from __future__ import annotations

import json
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from labeling.database import new_id, now
from labeling.entry import OWN_RULES, way
from labeling.settings import LabelingSettings
from labeling.tables import Exchange, Feedback, FeedbackKind
from service.routes.tensorzero import uuid7
from service.transfer.lines import FORMATS, format_named, rows_of
from service.transfer.reading import LineRefused, Options, exchange_id
from tests.running import PROJECT

OPTIONS = Options(PROJECT, scales={"stars": (1, 5), "errors": (10, 0)}, skip=frozenset({"noise"}))
# UUIDs of version 7: both were made at 2024-10-18 12:00:00.123 UTC.
INFERENCE, EPISODE, SAID = (f"0192a000-2a{n}b-7000-8000-000000000000" for n in "789")
MADE = datetime.fromtimestamp(int("0192a0002a7b", 16) / 1000, UTC)


def read(row: Any, form: str | None = None) -> list[Any]:
    return rows_of(json.dumps(row).encode(), format_named(form), OPTIONS)


def one(row: Any, form: str | None = None) -> Any:
    (found,) = read(row, form)
    return found


CHAT = {
    "id": INFERENCE,
    "function_name": "answer",
    "variant_name": "small",
    "episode_id": EPISODE,
    "input": {
        "system": {"tone": "kind"},
        "messages": [
            {"role": "user", "content": [{"type": "text", "text": "How warm"}, {"type": "text", "value": " is it?"}]},
            {
                "role": "assistant",
                "content": [{"type": "tool_call", "id": "c1", "name": "weather", "arguments": '{"at": "Oslo"}'}],
            },
            {"role": "user", "content": [{"type": "tool_result", "id": "c1", "name": "weather", "result": "3"}]},
            {"role": "user", "content": "And?"},
        ],
    },
    "output": [{"type": "thought", "text": "hm"}, {"type": "text", "text": "Three degrees."}],
    "tool_params": "",
    "inference_params": {"chat_completion": {"temperature": 0.5}},
    "processing_time_ms": 120,
    "tags": {"user": "u1"},
}


def test_tensorzero_chat_inference() -> None:
    """Of ClickHouse, where JSON stands in text columns, and of PostgreSQL: the same exchange with its own time."""
    texts = {key: json.dumps(CHAT[key]) for key in ("input", "output", "inference_params")}
    exchanges = [one(CHAT), one({**CHAT, **texts})]
    for found in exchanges:
        assert isinstance(found, Exchange)
        assert (found.completion_id, found.session_id, found.served) == (INFERENCE, EPISODE, "answer/small")
        assert (found.answers, found.latency_ms, found.created_at) == (["Three degrees."], 120, MADE)
        system, asked, called, result, again = found.messages
        assert system == {"role": "system", "content": '{"tone":"kind"}'}
        assert asked["content"] == [{"type": "text", "text": "How warm"}, {"type": "text", "text": " is it?"}]
        assert called["tool_calls"][0]["function"] == {"name": "weather", "arguments": '{"at": "Oslo"}'}
        assert result == {"role": "tool", "tool_call_id": "c1", "content": "3"}
        assert again == {"role": "user", "content": "And?"}
        assert found.parameters["tags"] == {"user": "u1"}


def test_tensorzero_json_inference_and_tool_calls() -> None:
    """What a JSON function wrote is its raw text; tool calls are kept as the gateway keeps them."""
    written = one({**CHAT, "output": json.dumps({"raw": '{"a": 1}', "parsed": {"a": 1}})})
    assert written.answers == ['{"a": 1}']
    call = {"type": "tool_call", "id": "c", "name": "look", "raw_name": "look", "raw_arguments": "{}"}
    assert json.loads(one({**CHAT, "output": [call]}).answers[0]) == [{"name": "look", "arguments": "{}"}]


def test_tensorzero_feedback() -> None:
    """Four tables of rows and the bodies of /feedback. A metric's target may be either: it is kept as both."""
    boolean = one({"id": SAID, "target_id": INFERENCE, "metric_name": "solved", "value": False, "tags": {"who": "x"}})
    assert (boolean.id, boolean.kind, boolean.value) == (f"tz_{SAID}", FeedbackKind.RATING, False)
    assert (boolean.completion_id, boolean.session_id) == (INFERENCE, INFERENCE)
    assert boolean.tags == {"tensorzero::metric_name": "solved", "who": "x"}
    number = one({"id": SAID, "target_id": EPISODE, "metric_name": "stars", "value": 2})
    assert number.value == 0.25
    comment = one({"id": SAID, "target_id": EPISODE, "target_type": "episode", "value": "too long"})
    assert (comment.kind, comment.comment, comment.session_id, comment.completion_id) == (
        FeedbackKind.COMMENT,
        "too long",
        EPISODE,
        None,
    )
    shown = one({"id": SAID, "inference_id": INFERENCE, "value": '[{"type": "text", "text": "4 degrees"}]'})
    assert (shown.kind, shown.value, shown.completion_id) == (FeedbackKind.CORRECTION, "4 degrees", INFERENCE)
    body = {"metric_name": "demonstration", "inference_id": INFERENCE, "value": "4 degrees"}
    assert (one(body).value, one(body).id) == ("4 degrees", one(body).id)
    assert one(body).id != one({**body, "value": "5 degrees"}).id
    assert read({**body, "dryrun": True}) == []
    called = one({**body, "value": [{"type": "tool_call", "id": "c", "name": "look", "arguments": '{"at": 1}'}]})
    function = {"name": "look", "arguments": '{"at": 1}'}
    assert called.value["tool_calls"] == [{"type": "function", "function": function}]


LOGGED = {
    "request": {"model": "m", "messages": [{"role": "user", "content": "Hi"}], "temperature": 0},
    "response": {
        "id": "chatcmpl-1",
        "model": "m-2",
        "created": 1_700_000_000,
        "choices": [{"index": 0, "message": {"role": "assistant", "content": "Hello"}, "finish_reason": "stop"}],
    },
}


def test_openai_pairs() -> None:
    """With everything beside them; a batch's bodies; the same pair without an id is the same exchange."""
    found = one(
        {**LOGGED, "request_id": "r", "session_id": "s", "latency_ms": 40, "created_at": "2024-01-02T03:04:05Z"}
    )
    assert (found.completion_id, found.served, found.answers) == ("chatcmpl-1", "m-2", ["Hello"])
    assert (found.request_id, found.session_id, found.latency_ms) == ("r", "s", 40)
    assert found.created_at == datetime(2024, 1, 2, 3, 4, 5, tzinfo=UTC)
    assert found.parameters == {"temperature": 0}
    assert one(LOGGED).created_at == datetime.fromtimestamp(1_700_000_000, UTC)
    batch = {"custom_id": "b7", "request": {"body": LOGGED["request"]}, "response": {"body": LOGGED["response"]}}
    assert (one(batch).request_id, one(batch).completion_id) == ("b7", "chatcmpl-1")
    nameless = {"request": LOGGED["request"], "response": {**LOGGED["response"], "id": None}}
    assert one(nameless).completion_id == one(nameless).completion_id != "chatcmpl-1"
    assert one(nameless).completion_id.startswith("im_")
    said = {"messages": [*LOGGED["request"]["messages"], {"role": "assistant", "content": "Hello"}]}  # type: ignore[misc]
    assert (one(said).messages, one(said).answers) == (LOGGED["request"]["messages"], ["Hello"])


SCORE = {
    "id": "sc1",
    "name": "helpful",
    "source": "API",
    "traceId": "t1",
    "timestamp": "2024-05-29T13:46:19.963Z",
    "dataType": "NUMERIC",
    "value": 0.5,
}
GENERATION = {
    "id": "o1",
    "trace_id": "t1",
    "type": "GENERATION",
    "session_id": "s1",
    "start_time": "2024-05-29 13:46:10.000000",
    "end_time": "2024-05-29 13:46:12.500000",
    "provided_model_name": "gpt",
    "model_parameters": '{"temperature":0.7}',
    "input": '[{"role": "user", "content": "Hi"}]',
    "output": '{"role": "assistant", "content": "Hello"}',
}


def test_langfuse_scores() -> None:
    """Both spellings; by observation, trace or session; each type as the kind of feedback that it is."""
    assert (one(SCORE).id, one(SCORE).value, one(SCORE).request_id) == ("lf_sc1", 0.5, "t1")
    assert one(SCORE).created_at == datetime(2024, 5, 29, 13, 46, 19, 963000, tzinfo=UTC)
    snake = {"id": "sc2", "name": "stars", "source": "ANNOTATION", "trace_id": "t1", "observation_id": "o1"}
    row = one({**snake, "data_type": "NUMERIC", "value": 5, "string_value": None, "comment": "good"})
    assert (row.completion_id, row.request_id, row.value, row.comment) == ("o1", None, 1.0, "good")
    assert row.tags == {"score": "stars", "source": "ANNOTATION"}
    category = one({**SCORE, "dataType": "CATEGORICAL", "value": 1, "stringValue": "rude"})
    assert (category.kind, category.comment) == (FeedbackKind.COMMENT, "helpful: rude")
    boolean = one(
        {**SCORE, "dataType": "BOOLEAN", "value": 0, "stringValue": "False", "traceId": None, "sessionId": "s"}
    )
    assert (boolean.kind, boolean.value, boolean.session_id) == (FeedbackKind.RATING, 0, "s")
    right = one({**SCORE, "dataType": "CORRECTION", "value": "It is 3 degrees."})
    assert (right.kind, right.value) == (FeedbackKind.CORRECTION, "It is 3 degrees.")
    assert read({**SCORE, "name": "noise"}) == []


def test_langfuse_observations_and_traces() -> None:
    """Generations become exchanges; a trace brings what is inside it, or else itself; spans are left out."""
    found = one(GENERATION)
    assert (found.completion_id, found.request_id, found.session_id, found.served) == ("o1", "t1", "s1", "gpt")
    assert (found.answers, found.latency_ms, found.parameters) == (["Hello"], 2500, {"temperature": 0.7})
    assert found.created_at == datetime(2024, 5, 29, 13, 46, 10, tzinfo=UTC)
    assert read({**GENERATION, "type": "SPAN"}) == []
    trace = {"id": "t1", "timestamp": "2024-05-29T13:46:00Z", "userId": "u", "name": "chat", "input": "Hi"}
    alone = one({**trace, "output": {"text": "Hello"}})
    assert (alone.completion_id, alone.messages) == ("t1", [{"role": "user", "content": "Hi"}])
    whole = read({**trace, "output": "Hello", "sessionId": "s", "observations": [GENERATION], "scores": [SCORE]})
    assert [type(row) for row in whole] == [Exchange, Feedback]
    assert (whole[0].completion_id, whole[0].session_id) == ("o1", "s")


def test_an_api_page_and_a_list_are_many_rows() -> None:
    assert len(read({"data": [GENERATION, SCORE], "meta": {"page": 1}})) == len(read([GENERATION, SCORE])) == 2


def test_feedback_bodies() -> None:
    """As POST /v1/feedback takes them, with an id and a time of their own."""
    body = {"kind": "flag", "exchange_id": "c", "reasons": ["wrong"], "id": "f1", "created_at": 1_700_000_000_000}
    assert (one(body).id, one(body).completion_id, one(body).reasons) == ("im_f1", "c", ["wrong"])
    assert one(body).created_at == datetime.fromtimestamp(1_700_000_000, UTC)
    for ours in (new_id("fb"), f"fb_{uuid7().hex}"):
        assert one({**body, "id": ours}).id == ours
    assert one({**body, "id": None}).id == one({**body, "id": None}).id != one({**body, "id": None, "choice": 1}).id
    assert one({**body, "id": None}).id.startswith("im_")


@pytest.mark.parametrize("given", ["7", "sa_7", "lp_7", "fb_7"])
def test_one_id_of_several_tools_is_several(given: str) -> None:
    """And none is taken for feedback of our own, which enters the queue by rules that nobody else may call on."""
    metric = {"id": given, "target_id": EPISODE, "metric_name": "solved", "value": False}
    found = [one({**row, "id": given}) for row in (metric, SCORE, {"kind": "flag", "exchange_id": "c"})]
    assert [row.id for row in found] == [f"{prefix}{given}" for prefix in ("tz_", "lf_", "im_")]
    assert not [row for row in found if way(row, LabelingSettings())[1] in OWN_RULES.values()]


def test_a_row_without_an_id_is_of_no_made_up_time() -> None:
    """One hash in sixty-four reads as a UUID of version 7, which would say when it was."""
    body = {"metric_name": "demonstration", "inference_id": INFERENCE}
    assert all(now() - one({**body, "value": str(n)}).created_at < timedelta(minutes=1) for n in range(400))


@pytest.mark.parametrize("made", [LOGGED, CHAT, GENERATION], ids=["openai", "tensorzero", "langfuse"])
def test_imported_exchanges_sort_by_their_own_time(made: dict[str, Any]) -> None:
    """As ids that we make do; the same exchange has the same one, of two projects two."""
    found = one(made)
    before, after = (found.created_at + timedelta(milliseconds=step) for step in (-1, 1))
    bounds = [f"ex_{int(at.timestamp() * 1000):011x}" for at in (before, after)]
    assert bounds[0] < found.id < bounds[1]
    assert len(found.id) == len(new_id("ex"))
    assert one(made).id == found.id != exchange_id("other", found.completion_id, found.created_at)


REFUSED: list[tuple[Any, str]] = [
    ({"a": 1}, "no known format has the fields a"),
    (["x"], "not an object"),
    ({**CHAT, "output": []}, "no answer"),
    ({**CHAT, "input": {"messages": []}}, "no prompt"),
    ({key: value for key, value in CHAT.items() if key != "input"}, "chat_inference_data"),
    ({"inference_id": INFERENCE, "raw_request": "{}", "id": SAID}, "ModelInference"),
    ({"id": SAID, "target_id": EPISODE, "metric_name": "points", "value": 7}, "--scale points="),
    ({"id": SAID, "target_id": EPISODE, "metric_name": "stars", "value": 7}, "outside of its scale 1:5"),
    ({"id": SAID, "target_id": EPISODE, "metric_name": "m", "value": "x"}, "no number"),
    ({**LOGGED, "response": {"error": {"message": "x"}}}, "error"),
    ({**LOGGED, "request": {"model": "m", "prompt": ["a", "b"]}}, "not one prompt"),
    ({**LOGGED, "created_at": "yesterday"}, "no time"),
    ({"messages": [{"role": "user", "content": "Hi"}]}, "no answer"),
    ({**SCORE, "traceId": None}, "names no observation"),
    ({**SCORE, "comment": "a\0b"}, "U+0000"),
    ({"kind": "flag"}, "exchange_id"),
    ({"kind": "flag", "exchange_id": "c", "tags": {"a": [[[]] * 2]}}, "tags"),
    ({"table": "feedback", "row": {"id": "x"}}, "is missing"),
    ({"table": "feedback", "row": {"id": "x", "project": "p", "kind": "flag", "shoe": 1}}, "no column shoe"),
    ({"table": "feedback", "row": {"id": "x", "project": "p", "kind": "praise"}}, "does not fit"),
    (
        {"table": "feedback", "row": {"id": "x", "project": "p", "kind": "flag", "choice": 2**40}},
        "choice: '1099511627776'",
    ),
    ({"table": "api_keys", "row": {}}, "no table"),
    ({"nightschool_export": 99}, "form 99"),
]


@pytest.mark.parametrize(("row", "reason"), REFUSED, ids=[reason for _, reason in REFUSED])
def test_refused_with_the_reason(row: Any, reason: str) -> None:
    with pytest.raises(LineRefused) as caught:
        read(row)
    assert reason in str(caught.value)


@pytest.mark.parametrize("line", [b"{", b"\xff", b"[" * 100_000, b'{"a":' * 80 + b"1" + b"}" * 80, b'"\\ud800"'])
def test_bytes_that_are_no_row(line: bytes) -> None:
    with pytest.raises(LineRefused):
        rows_of(line, None, OPTIONS)


@pytest.mark.parametrize("form", FORMATS)
def test_a_named_format_is_not_guessed(form: str) -> None:
    """Whatever is given as it, is read or refused as it, and never ends in another error."""
    for row in ({}, CHAT, LOGGED, SCORE, GENERATION, {"table": "feedback", "row": []}, {"value": {}, "target_id": 5}):
        try:
            read(row, form)
        except LineRefused:
            continue
