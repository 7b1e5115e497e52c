"""Tasks offered to as many people as their items want: the free edition closes a task at its `overlap`."""

from __future__ import annotations

from sqlalchemy import update
from sqlmodel import col, select

from labeling.database import Database
from labeling.label_studio import LabelStudioServer
from labeling.tables import ItemState, ReviewItem


async def offer_again(database: Database, server: LabelStudioServer, project: str, server_project: int) -> int:
    """How many tasks were opened to more people, or closed to them. Tasks that are gone are passed over."""
    async with database.read() as session:
        differing = select(ReviewItem.id, col(ReviewItem.task_id), ReviewItem.people_wanted).where(
            col(ReviewItem.project) == project,
            col(ReviewItem.people_wanted) != col(ReviewItem.people_offered),
            col(ReviewItem.state).in_((ItemState.PUSHED, ItemState.DISPUTED, ItemState.LABELLED)),
            col(ReviewItem.task_id).is_not(None),
        )
        rows = (await session.execute(differing.order_by(col(ReviewItem.id)))).all()
    if not rows:
        return 0
    wanted = {task_id: people for _, task_id, people in rows if task_id is not None}
    offered = 0
    async for task in server.tasks_by_id(server_project, wanted):
        await server.offer_to(task, wanted[task.id])
        offered += 1
    async with database.write() as session:
        for item_id, _, people in rows:
            # Not if it was settled anew meanwhile: the next round has that number.
            same = (col(ReviewItem.id) == item_id) & (col(ReviewItem.people_wanted) == people)
            await session.execute(update(ReviewItem).where(same).values(people_offered=people))
    return offered
