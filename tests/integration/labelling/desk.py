"""One project's review queue with its project on a real Label Studio, as the tests of this folder use it."""

from __future__ import annotations

import secrets
from collections.abc import Callable
from typing import Any

import pytest
from sqlalchemy import update
from sqlmodel import col

from labeling.agreement import labels_ready
from labeling.database import Database
from labeling.label_studio import LabelStudioServer, SeenTask
from labeling.labeling_screen import Opinion, as_result
from labeling.pull import PullReport, pull
from labeling.push import PushReport, push
from labeling.settings import LabelingSettings
from labeling.tables import Label, LabellingProject, ReviewItem
from tests.running import rows

NO_SWEEP = 86_400.0
WRONG = Opinion("wrong", "14 days.", ("14 days|two weeks",))


class Desk:
    """One project's review queue, its Label Studio project and one labeller."""

    def __init__(self, database: Database, server: LabelStudioServer, **settings: Any) -> None:
        self.database, self.server = database, server
        self.project = f"desk-{secrets.token_hex(4)}"
        self.settings = LabelingSettings(**{"sweep_seconds": NO_SWEEP, **settings})

    async def flagged(self, *scores: float, answer: str = "30 days.", **values: Any) -> list[ReviewItem]:
        items = [
            ReviewItem(
                project=self.project,
                prompt_digest=secrets.token_hex(8),
                messages=[{"role": "user", "content": f"How long? ({score})"}],
                answer=answer,
                score=score,
                count=1,
                **values,
            )
            for score in scores
        ]
        async with self.database.write() as session:
            session.add_all(items)
        return items

    async def push(self, server: LabelStudioServer | None = None) -> PushReport:
        return await push(self.database, server or self.server, self.project, self.settings)

    async def pull(self, *, sweep: bool | None = None) -> PullReport:
        return await pull(self.database, self.server, self.project, self.settings, sweep=sweep)

    async def server_project(self) -> int:
        return int((await self._rows(LabellingProject))[0].server_project)

    async def tasks(self) -> list[SeenTask]:
        return [task async for task in self.server.changed_tasks(await self.server_project(), None)]

    async def task_of(self, item: ReviewItem) -> int:
        (task,) = (await self.server.find_tasks(await self.server_project(), [item.id]))[item.id]
        return task.id

    async def annotate(self, item: ReviewItem, opinion: Opinion, by: LabelStudioServer | None = None) -> int:
        return await (by or self.server).annotate(await self.task_of(item), as_result(opinion))

    async def item(self, item: ReviewItem) -> ReviewItem:
        async with self.database.read() as session:
            found = await session.get(ReviewItem, item.id)
        assert found is not None
        return found

    async def label(self, item: ReviewItem) -> Label | None:
        async with self.database.read() as session:
            return await session.get(Label, item.id)

    async def change(self, item: ReviewItem, **values: Any) -> None:
        async with self.database.write() as session:
            await session.execute(update(ReviewItem).where(col(ReviewItem.id) == item.id).values(**values))

    async def ready(self) -> list[str | None]:
        async with self.database.read() as session:
            return [label.correction for label in await labels_ready(session, self.project)]

    async def _rows(self, table: Any) -> list[Any]:
        return [row for row in await rows(self.database, table) if row.project == self.project]


MakeDesk = Callable[..., Desk]


# The tests whose statements PostgreSQL could take otherwise run on both; the others are about Label Studio.
both = pytest.mark.parametrize("database_url", ["sqlite", "postgres"], indirect=True)
