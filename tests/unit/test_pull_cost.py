"""A pull costs what came back: not what was ever annotated."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

from sqlalchemy import event, insert, text

from labeling.crew import ACTIVE, read_crew
from labeling.database import Database, now
from labeling.parts import in_parts
from labeling.settings import LabelingSettings
from labeling.tables import Annotation, ItemState, ReviewItem
from tests.running import PROJECT

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
