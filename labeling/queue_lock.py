"""The lock of one project's review queue, for transactions that change many of its items."""

from __future__ import annotations

from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncSession

from labeling.database import Database


async def one_at_a_time(session: AsyncSession, database: Database, project: str) -> None:
    """Until the transaction ends. SQLite has one writer anyway; on PostgreSQL two folds of a project would count the
    same feedback twice, and a fold and a rescoring would lock rows in each other's order.
    """
    if not database.is_sqlite:
        await session.execute(text("SELECT pg_advisory_xact_lock(hashtext(:name))"), {"name": f"fold:{project}"})
