"""Import and export over HTTP: nothing doubled, nothing lost, and what went out comes back in the same."""

from __future__ import annotations

import json
import secrets
import uuid
from collections.abc import AsyncIterator, Iterable
from datetime import UTC, datetime, timedelta
from typing import Any

import httpx
import pytest
from sqlalchemy import select, text
from sqlmodel import SQLModel

from labeling.crew import Crew
from labeling.database import Database, now
from labeling.feedback import fold
from labeling.settings import LabelingSettings, MetricSettings
from labeling.settling import settle
from labeling.tables import (
    Annotation,
    EntryProgress,
    Exchange,
    Feedback,
    FeedbackKind,
    GoodAnswer,
    ItemMember,
    Label,
    LabellingProject,
    ReviewItem,
)
from loop.tables import Night, NightState, Promotion
from service.app import assemble, create_app
from service.routes.transfer import BadScale, scales_of, transfer_routes
from service.transfer import own_rows
from service.transfer.exporting import exported as stream
from service.transfer.reading import exchange_id
from tests.running import PROJECT, Service, count, rows, serving, settings_for
from tests.unit.test_feedback import exchange, feedback, store
from tests.unit.test_transfer_formats import CHAT, EPISODE, GENERATION, INFERENCE, LOGGED, SAID, SCORE

OTHER = "other-bot"
SETTINGS = LabelingSettings(held_out_share=0)


@pytest.fixture
async def running(database: Database) -> AsyncIterator[Service]:
    settings = settings_for(["http://127.0.0.1:9"], projects=(PROJECT, OTHER))
    metrics = {"tries": MetricSettings(low=1, high=9, optimize="min")}
    labeling = settings.projects[0].labeling.model_copy(update={"metrics": metrics})
    projects = {project.name: project.model_copy(update={"labeling": labeling}) for project in settings.projects}
    state = assemble(settings, database)
    routes = transfer_routes(database, state.keys, state.reporters, projects)
    async with serving(create_app(settings, state, extra_routes=routes)) as url:
        yield Service(url, settings, state)


@pytest.fixture
async def admin(running: Service) -> AsyncIterator[httpx.AsyncClient]:
    async with await running.client("admin", project=None) as client:
        yield client


async def imported(client: httpx.AsyncClient, lines: Iterable[Any] | bytes, **params: Any) -> dict[str, Any]:
    body = lines if isinstance(lines, bytes) else b"\n".join(json.dumps(line).encode() for line in lines)
    answer = await client.post("/v1/import", content=body, params={"project": PROJECT, **params})
    assert answer.status_code == 200, answer.text
    return dict(answer.json())


async def exported(client: httpx.AsyncClient, **params: Any) -> list[dict[str, Any]]:
    answer = await client.get("/v1/export", params=params)
    assert answer.status_code == 200, answer.text
    assert answer.headers["content-type"].startswith("application/x-ndjson")
    return [json.loads(line) for line in answer.text.splitlines()]


async def everything(database: Database) -> dict[str, list[Any]]:
    found = {}
    async with database.read() as session:
        for name, model in own_rows.imported_tables().items():
            table = own_rows.table_of(model)
            ordered = select(*own_rows.exported_columns(table)).order_by(*table.primary_key.columns)
            found[name] = [dict(row._mapping) for row in (await session.execute(ordered)).all()]
    return found


async def test_again_changes_nothing(database: Database, admin: httpx.AsyncClient) -> None:
    """The same lines twice, in one request and in two: stored once, the rest counted as known."""
    lines = [CHAT, LOGGED, GENERATION, SCORE, CHAT, {"kind": "flag", "exchange_id": "c"}]
    first = await imported(admin, lines)
    assert first["stored"] == {"exchanges": 3, "feedback": 2}
    assert first["duplicates"] == {"exchanges": 1}
    before = await everything(database)
    second = await imported(admin, lines)
    assert second["stored"] == {}
    assert second["duplicates"] == {"exchanges": 4, "feedback": 2}
    assert await everything(database) == before


async def test_refused_lines_are_named_and_stop_no_other(database: Database, admin: httpx.AsyncClient) -> None:
    """By their number in the file, also those that only the database refuses; empty lines count, but hold nothing."""
    flag = {"kind": "flag", "exchange_id": "c"}
    lines = [json.dumps(line).encode() for line in (CHAT, {"a": 1}, flag, LOGGED)]
    body = b"\n".join([lines[0], b"", b"{", lines[1], lines[2], lines[3], b""])
    answer = await imported(admin, body, first_line=101)
    assert [one["line"] for one in answer["refused"]] == [103, 104]
    assert answer["stored"] == {"exchanges": 2, "feedback": 1}
    huge_id = feedback(completion_id=secrets.token_hex(20_000)).model_dump(mode="json")
    answer = await imported(admin, [own("feedback", huge_id), {"kind": "flag", "exchange_id": "d"}])
    if database.is_sqlite:
        assert answer["stored"] == {"feedback": 2}
    else:
        assert [one["line"] for one in answer["refused"]] == [1]
        assert "the database refuses it" in answer["refused"][0]["reason"]
        assert answer["stored"] == {"feedback": 1}


def own(table: str, row: dict[str, Any]) -> dict[str, Any]:
    return {"table": table, "row": row}


async def test_a_dry_run_stores_nothing(database: Database, admin: httpx.AsyncClient) -> None:
    await imported(admin, [LOGGED])
    answer = await imported(admin, [LOGGED, CHAT, SCORE, SCORE, {"a": 1}], dry_run=True)
    assert answer["stored"] == {"exchanges": 1, "feedback": 1}
    assert answer["duplicates"] == {"exchanges": 1, "feedback": 1}
    assert len(answer["refused"]) == 1
    assert (await count(database, Exchange), await count(database, Feedback)) == (1, 0)


METRIC = {"id": SAID, "metric_name": "solved", "value": False}


@pytest.mark.parametrize("feedback_first", [True, False])
async def test_a_metric_finds_its_inference_or_its_episode(
    database: Database, admin: httpx.AsyncClient, feedback_first: bool
) -> None:
    """TensorZero's rows do not say which of the two the target is, and may come in any order."""
    on_episode = {**METRIC, "id": SAID.replace("0192a0", "0192a1"), "target_id": EPISODE}
    files: list[list[Any]] = [[CHAT], [{**METRIC, "target_id": INFERENCE}, on_episode]]
    for lines in reversed(files) if feedback_first else files:
        await imported(admin, lines)
    assert await fold(database, PROJECT, SETTINGS) == 2
    (known,) = await rows(database, Exchange)
    assert {row.exchange_id for row in await rows(database, Feedback)} == {known.id}
    (item,) = await rows(database, ReviewItem)
    assert item.count == 2


async def test_metrics_that_the_settings_know(database: Database, admin: httpx.AsyncClient) -> None:
    """Their range and direction hold for an import as for POST /feedback; what is given with it comes first."""
    rows_of = [{**METRIC, "target_id": EPISODE, "metric_name": "tries", "value": 3}]
    await imported(admin, rows_of)
    assert [row.value for row in await rows(database, Feedback)] == [0.75]
    again = [{**rows_of[0], "id": INFERENCE}]
    await imported(admin, again, scale="tries=1:5")
    assert {row.value for row in await rows(database, Feedback)} == {0.75, 0.5}


async def test_reporters_are_hashed(database: Database, admin: httpx.AsyncClient) -> None:
    """Nobody's name is stored; the same person is the same pseudonym, also in what the app sends itself."""
    flag = {"kind": "flag", "exchange_id": "c", "reporter": "ann", "id": "f1"}
    by_hand = feedback(completion_id="d", reporter="ann", id="f2").model_dump(mode="json")
    scores = [{**SCORE, "authorUserId": "ann"}, {**SCORE, "id": "sc2", "authorUserId": "bob"}]
    await imported(admin, [flag, own("feedback", by_hand), *scores])
    known = {row.id: row.reporter for row in await rows(database, Feedback)}
    assert known["im_f1"] == known["f2"] == known["lf_sc1"] != known["lf_sc2"]
    assert all(str(reporter).startswith("rp_") for reporter in known.values())
    lines = await exported(admin)
    assert {line["row"]["reporter"] for line in lines if line.get("table") == "feedback"} == set(known.values())
    assert "reporter_salts" not in lines[-1]["end"]


async def test_imported_feedback_is_found_by_the_id_that_it_had(database: Database, admin: httpx.AsyncClient) -> None:
    """A UUID means the answer of POST /feedback first."""
    flag = {"kind": "flag", "exchange_id": "c", "id": "f1"}
    await imported(admin, [flag, SCORE, {**METRIC, "target_id": EPISODE}])

    async def shown(given: str) -> str:
        return str((await admin.get(f"/v1/feedback/{given}")).json()["id"])

    ids = {"f1": "im_f1", "im_f1": "im_f1", "sc1": "lf_sc1", SAID: f"tz_{SAID}"}
    assert {given: await shown(given) for given in ids} == ids
    ours = f"fb_{uuid.UUID(SAID).hex}"
    await store(database, feedback(completion_id="c", id=ours))
    assert await shown(SAID) == ours
    assert (await admin.get("/v1/feedback/f2")).status_code == 404


async def test_imported_history_is_not_drawn_from(database: Database, admin: httpx.AsyncClient) -> None:
    """A rule that draws from all traffic looked an hour ago: of an import it takes what happened since."""
    hour = timedelta(hours=1)
    looked_at = exchange_id(PROJECT, "newest", now() - hour)
    async with database.write() as session:
        session.add(EntryProgress(project=PROJECT, rule="everything", exchange_id=looked_at))
    log = {"old": now() - 2 * hour, "new": now() - hour / 2}
    said = {"role": "assistant", "content": "So."}
    await imported(
        admin,
        [
            {"messages": [{"role": "user", "content": what}, said], "created_at": at.isoformat()}
            for what, at in log.items()
        ],
    )
    rule = LabelingSettings.model_validate({"held_out_share": 0, "entry": {"everything": 1.0}})
    await fold(database, PROJECT, rule)
    assert [item.messages[0]["content"] for item in await rows(database, ReviewItem)] == ["new"]


async def test_a_trace_score_is_of_its_last_generation(database: Database, admin: httpx.AsyncClient) -> None:
    later = {**GENERATION, "id": "o2", "start_time": "2024-05-29 13:46:15.000000", "end_time": None}
    await imported(admin, [later, GENERATION, SCORE])
    (row,) = await rows(database, Feedback)
    last = next(one for one in await rows(database, Exchange) if one.completion_id == "o2")
    assert row.exchange_id == last.id


async def _filled(database: Database) -> None:
    """A row in every table that is exported: two flags folded, one label, a good answer, a night, a promotion."""
    known, good, foreign = exchange(), exchange("And who now?"), exchange(project=OTHER)
    await store(database, known, good, foreign, feedback(known, severity=0.75, reasons=["wrong"], tags={"a": "ü"}))
    await store(database, feedback(known), feedback(good, kind=FeedbackKind.RATING, value=1))
    await store(database, feedback(foreign, project=OTHER), feedback(completion_id="never", comment="gone"))
    for project in (PROJECT, OTHER):
        await fold(database, project, SETTINGS)
    item = next(row for row in await rows(database, ReviewItem) if row.project == PROJECT)
    said = Annotation(
        labelling_project=3,
        annotation_id=4,
        item_id=item.id,
        annotator="ann",
        verdict="wrong",
        correction="Ada",
        updated_at=now(),
        lead_seconds=1.5,
    )
    async with database.write() as session:
        session.add(said)
        session.add(LabellingProject(project=PROJECT, server_project=3))
        session.add(Night(project=PROJECT, date=now().date(), due_at=now(), state=NightState.PROMOTED))
        session.add(Promotion(project=PROJECT, from_adapter="a", to_adapter="b", by="x", why=""))
    async with database.write() as session:
        await settle(session, await session.get_one(ReviewItem, item.id), LabelingSettings(), Crew())


async def test_what_went_out_comes_back_the_same(database: Database, admin: httpx.AsyncClient) -> None:
    """Every row of every table that comes back, into an empty installation; a second time adds none."""
    await _filled(database)
    before = await everything(database)
    for filled in (Exchange, Feedback, ReviewItem, ItemMember, Annotation, Label, GoodAnswer):
        assert before[str(filled.__tablename__)], filled
    lines = await exported(admin)
    assert lines[0]["nightschool_export"] == 1
    assert lines[-1]["end"] == {name: len([x for x in lines if x.get("table") == name]) for name in lines[-1]["end"]}
    assert lines[-1]["end"]["nights"] == lines[-1]["end"]["promotions"] == 1
    async with database.write() as session:
        for model in reversed(own_rows.imported_tables().values()):
            await session.execute(own_rows.table_of(model).delete())
    body = b"\n".join(json.dumps(line).encode() for line in lines)
    answer = (await admin.post("/v1/import", content=body)).json()
    assert answer["refused"] == []
    assert answer["left_out"] == 4  # first line, last line, the night and the promotion
    assert await everything(database) == before
    again = (await admin.post("/v1/import", content=body)).json()
    assert sum(again["stored"].values()) == 0
    assert await everything(database) == before


async def test_one_project_goes_out_alone_and_into_another(database: Database, admin: httpx.AsyncClient) -> None:
    """Rows without a project of their own go by what they belong to."""
    await _filled(database)
    lines = await exported(admin, project=OTHER)
    assert {line["row"].get("project", OTHER) for line in lines if "row" in line} == {OTHER}
    assert lines[-1]["end"]["item_members"] == lines[-1]["end"]["feedback"] == 1
    assert [list(line) for line in await exported(admin, table=["labels"])][1:-1] == [["table", "row"]]
    async with database.write() as session:
        for model in reversed(own_rows.imported_tables().values()):
            await session.execute(own_rows.table_of(model).delete())
    answer = await imported(admin, lines, project=PROJECT)
    assert answer["refused"] == []
    assert {row.project for row in await rows(database, Feedback)} == {PROJECT}


async def test_rows_whose_parents_are_missing(database: Database, admin: httpx.AsyncClient) -> None:
    """A reference that may be empty is emptied and found anew by the completion id; otherwise the line is refused."""
    known = exchange()
    await store(database, known)
    row = feedback(known, exchange_id="ex_elsewhere").model_dump(mode="json")
    member = {"feedback_id": row["id"], "item_id": "it_gone", "exchange_id": None}
    answer = await imported(admin, [own("feedback", row), own("item_members", member)])
    assert [one["reason"] for one in answer["refused"]] == ["item_id it_gone: no such row in review_items"]
    assert [found.exchange_id for found in await rows(database, Feedback)] == [known.id]


async def test_another_projects_rows_are_out_of_reach(
    database: Database, running: Service, admin: httpx.AsyncClient
) -> None:
    """A project's admin neither reads nor writes another's, and no id is taken away from it."""
    await _filled(database)
    item = next(row for row in await rows(database, ReviewItem) if row.project == OTHER)
    taken = next(row for row in await rows(database, Feedback) if row.project == OTHER)
    async with await running.client("admin", project=PROJECT) as mine:
        lines = await exported(mine)
        assert {line["row"].get("project", PROJECT) for line in lines if "row" in line} == {PROJECT}
        assert (await mine.get("/v1/export", params={"project": OTHER})).status_code == 403
        assert (await mine.post("/v1/import", content=b"", params={"project": OTHER})).status_code == 403
        said = {"labelling_project": 9, "annotation_id": 9, "item_id": item.id, "annotator": "x"}
        said |= {"updated_at": "2024-01-01T00:00:00Z"}
        row = {"kind": "flag", "exchange_id": "c", "id": taken.id}
        answer = await imported(mine, [own("annotations", said), row])
        assert [one["line"] for one in answer["refused"]] == [1, 2]
        assert "another project" in answer["refused"][1]["reason"]
    async with await running.client("read", "feedback") as reader:
        assert (await reader.get("/v1/export")).status_code == 403
        assert (await reader.post("/v1/import", content=b"")).status_code == 403
    unknown = await imported(
        admin, [own("feedback", feedback(project="x", answer="y").model_dump(mode="json"))], project=""
    )
    assert unknown["refused"][0]["reason"] == "no project 'x' in the settings"


async def test_names_that_nobody_has(admin: httpx.AsyncClient) -> None:
    for path, params in (
        ("/v1/import", {"project": "nobody"}),
        ("/v1/import", {"format": "xml"}),
        ("/v1/import", {"scale": "stars"}),
    ):
        assert (await admin.post(path, content=b"", params=params)).status_code in (404, 422)
    assert (await admin.get("/v1/export", params={"table": "api_keys"})).status_code == 422


def test_scales() -> None:
    assert scales_of(["stars=1:5", "a=b=10:-1"]) == {"stars": (1, 5), "a=b": (10, -1)}
    for wrong in ("stars", "stars=1", "=1:5", "stars=1:1", "stars=1:x", "stars=nan:5"):
        with pytest.raises(BadScale):
            scales_of([wrong])


def test_every_table_of_the_queue_is_exported() -> None:
    """A table that is new there goes out and in without another line of code, or is named in STAYS."""
    tables = set(SQLModel.metadata.tables)
    assert own_rows.exported_tables().keys() | own_rows.STAYS <= tables
    assert {"exchanges", "feedback", "review_items", "labels", "good_answers"} <= own_rows.imported_tables().keys()


async def test_an_export_is_of_one_moment(database: Database) -> None:
    """What is written while it runs is in none of its tables."""
    await store(database, *(exchange(str(number)) for number in range(3)))
    lines: list[bytes] = []
    async for chunk in stream(database, ["exchanges", "feedback"], None):
        if len(lines) == 1:
            await store(database, late := exchange("late"), feedback(late))
        lines.append(chunk)
    assert json.loads(lines[-1])["end"] == {"exchanges": 3, "feedback": 0}
    assert await count(database, Exchange) == 4


async def test_feedback_that_never_linked_is_shown(
    database: Database, running: Service, admin: httpx.AsyncClient
) -> None:
    """With what it named and how old it is; not what brings its own messages, nor what was linked since."""
    late = exchange()
    old = feedback(completion_id="never", comment="gone", created_at=now() - timedelta(days=2))
    whole = feedback(messages=[{"role": "user", "content": "q"}], answer="a")
    await store(
        database, old, feedback(late), whole, feedback(session_id="s9"), feedback(project=OTHER, request_id="r")
    )
    async with await running.client("read") as reader:
        path = f"/v1/projects/{PROJECT}/feedback/unlinked"
        found = (await reader.get(path)).json()
        assert found["total"] == 3
        assert found["feedback"][0]["named"] == {"exchange_id": "never"}
        assert found["feedback"][0]["age_seconds"] >= 2 * 86_400
        await store(database, late)
        found = (await reader.get(path, params={"limit": 1})).json()
        assert (found["total"], len(found["feedback"])) == (2, 1)
        assert (await reader.get(f"/v1/projects/{OTHER}/feedback/unlinked")).status_code == 403
    assert (await admin.get("/v1/projects/nobody/feedback/unlinked")).status_code == 404


async def test_times_are_kept_to_the_microsecond(database: Database, admin: httpx.AsyncClient) -> None:
    at = datetime(2023, 4, 5, 6, 7, 8, 123456, tzinfo=UTC)
    await store(database, exchange(created_at=at))
    lines = await exported(admin, table="exchanges")
    async with database.write() as session:
        await session.execute(text("DELETE FROM exchanges"))
    await imported(admin, lines)
    assert [row.created_at for row in await rows(database, Exchange)] == [at]


async def test_what_a_looping_model_wrote_stops_no_import(database: Database, admin: httpx.AsyncClient) -> None:
    """Brackets that only look like JSON are text; numbers beyond all bounds are refused, with their line."""
    loop = {**GENERATION, "id": "looped", "output": "[" * 5_000}
    huge = {**SCORE, "id": "huge", "value": 10**400}
    answer = await imported(admin, [loop, huge, CHAT])
    assert [one["line"] for one in answer["refused"]] == [2]
    assert answer["stored"] == {"exchanges": 2}
    assert ["[" * 5_000] in [row.answers for row in await rows(database, Exchange)]


async def test_a_line_of_ours_has_what_its_columns_hold(database: Database, admin: httpx.AsyncClient) -> None:
    """Messages that are none would break the queue later; a byte order mark is no part of a line."""
    item = ReviewItem(project=PROJECT, prompt_digest="d", messages=[], answer="So.").model_dump(mode="json")
    lines = [own("review_items", {**item, "messages": 5}), own("review_items", {**item, "reasons": [7]})]
    answer = await imported(admin, lines)
    assert [one["line"] for one in answer["refused"]] == [1, 2]
    assert (await imported(admin, b"\xef\xbb\xbf" + json.dumps(CHAT).encode()))["stored"] == {"exchanges": 1}
