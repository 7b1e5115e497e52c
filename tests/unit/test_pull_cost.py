"""A pull costs what came back: not what was ever annotated."""

from __future__ import annotations

from collections.abc import AsyncIterator
from datetime import timedelta
from typing import Any

import pytest
from sqlalchemy import event, insert, text, update
from sqlmodel import col

from labeling.crew import ACTIVE, read_crew
from labeling.database import Database, now
from labeling.gold import add_gold, parse_gold
from labeling.label_studio import LabelStudioServer
from labeling.labeling_screen import Opinion
from labeling.parts import in_parts
from labeling.settings import LabelingSettings
from labeling.standing import follow_standing
from labeling.tables import Annotation, DoubtedAnnotator, GoldQuestion, ItemState, ReviewItem
from tests.fakes.label_studio_server import EMAIL, TOKEN, FakeLabelStudio, fake_label_studio
from tests.integration.labelling.desk import Desk
from tests.running import PROJECT, rows

YEARS = 2_000  # annotations
LATELY = 20


async def annotated(database: Database, number: int, lately: int) -> None:
    """`number` items with an annotation each, two a day's quarter; the last `lately` within the days that count."""
    since = now() - ACTIVE
    ids = [f"it_{place:06}" for place in range(number)]
    items = [
        ReviewItem(
            id=item_id, project=PROJECT, prompt_digest=item_id, messages=[], answer="", state=ItemState.LABELLED
        ).model_dump()
        for item_id in ids
    ]
    annotations = [
        Annotation(
            labelling_project=1,
            annotation_id=place,
            item_id=item_id,
            annotator="gone" if place < number - lately else f"here-{place % 2}",
            updated_at=since + timedelta(hours=3 * (place - (number - lately)) + 1),
        ).model_dump()
        for place, item_id in enumerate(ids)
    ]
    async with database.write() as session:
        for table, stored in ((ReviewItem, items), (Annotation, annotations)):
            for part in in_parts(stored, 500):
                await session.execute(insert(table), part)


async def plan(database: Database, statement: str, values: Any) -> str:
    """As the database tells it, with what it knows of its tables."""
    words = "EXPLAIN QUERY PLAN" if database.is_sqlite else "EXPLAIN"
    async with database.engine.begin() as connection:
        if not database.is_sqlite:
            await connection.execute(text("ANALYZE"))
        rows = (await connection.exec_driver_sql(f"{words} {statement}", values)).all()
    return "\n".join(str(row[-1]) for row in rows)


async def test_who_labels_lately_is_found_by_an_index(database: Database) -> None:
    """Years of annotations, and those of this month are read: on SQLite and on PostgreSQL."""
    await annotated(database, YEARS, LATELY)
    statements: list[tuple[str, Any]] = []
    event.listen(database.engine.sync_engine, "before_cursor_execute", lambda *call: statements.append(call[2:4]))
    async with database.read() as session:
        crew = await read_crew(session, PROJECT, LabelingSettings().annotators)
        assert (await read_crew(session, "other", LabelingSettings().annotators)).people == set()
    assert crew.people == {"here-0", "here-1"}
    statement, values = next(call for call in statements if "DISTINCT" in call[0])
    told = await plan(database, statement, values)
    assert "ix_annotations_updated_at" in told, told


LYON = {"question": "The capital of France?", "answer": "Lyon.", "verdict": "wrong", "must_contain": ["Paris"]}


async def test_only_the_gold_answers_of_some_people_are_fetched(database: Database) -> None:
    """Ten of this month's twenty, found by their question on both databases: years of other items are passed by."""
    await annotated(database, YEARS, LATELY)
    await add_gold(database, PROJECT, parse_gold([LYON]))
    (question,) = await rows(database, GoldQuestion)
    lately = col(ReviewItem.id) >= f"it_{YEARS - LATELY:06}"
    async with database.write() as session:
        await session.execute(update(ReviewItem).where(lately).values(gold_id=question.id))
    statements: list[tuple[str, Any]] = []
    fetched: list[int] = []

    def done(_connection: Any, cursor: Any, statement: str, values: Any, *_rest: Any) -> None:
        statements.append((statement, values))
        fetched.append(len(getattr(cursor, "_rows", ())))

    event.listen(database.engine.sync_engine, "after_cursor_execute", done)
    await follow_standing(database, PROJECT, LabelingSettings(gold={"min_answers": 1}), {"here-0"})
    event.remove(database.engine.sync_engine, "after_cursor_execute", done)
    assert {row.annotator for row in await rows(database, DoubtedAnnotator)} == {"here-0"}
    (number,) = [place for place, (statement, _) in enumerate(statements) if "JOIN gold_questions" in statement]
    assert fetched[number] == LATELY // 2
    told = await plan(database, *statements[number])
    assert "ix_review_items_gold_id" in told, told


@pytest.fixture
async def fake() -> AsyncIterator[tuple[str, FakeLabelStudio]]:
    async with fake_label_studio() as found:
        yield found


async def test_a_pull_looks_at_whom_it_concerns(database: Database, fake: tuple[str, FakeLabelStudio]) -> None:
    """Who answered, edited or took back; everybody's standing is a sweep's."""
    server = LabelStudioServer(fake[0], TOKEN)
    desk = Desk(database, server, gold={"min_answers": 1, "share": 0.5})
    await add_gold(database, desk.project, parse_gold([LYON]))
    await desk.flagged(0.5)
    await desk.push()
    await desk.pull(sweep=True)
    (gold,) = [item for item in await rows(database, ReviewItem) if item.gold_id]
    async with database.write() as session:
        session.add(DoubtedAnnotator(project=desk.project, annotator="bob", why="nothing that still holds"))

    async def doubted() -> set[str]:
        return {row.annotator for row in await rows(database, DoubtedAnnotator)}

    number = await desk.annotate(gold, Opinion("good", None))
    await desk.pull()
    assert await doubted() == {"bob", EMAIL}
    await server.request("DELETE", f"/api/annotations/{number}/", "as by hand")
    await desk.pull()
    assert await doubted() == {"bob"}
    await desk.pull(sweep=True)
    assert await doubted() == set()
    await server.close()
