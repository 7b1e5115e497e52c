"""Old exchanges go when a project keeps them for some days only. What anything refers to stays: feedback of any kind,
an item's member, a good answer. Labels hold their own copy of what was shown.

Each look goes once through all that is old, the oldest first, in pages of `BATCH`: keys of one page are in memory, and
each page that has something to delete is a transaction of its own, so that others write in between. What stays is read
again at the next look, by indexes alone. A look that breaks off has deleted and counted whole pages.
"""

from __future__ import annotations

from datetime import datetime, timedelta

import structlog
from sqlalchemy import ColumnElement, delete, exists, or_, tuple_
from sqlalchemy.engine import CursorResult
from sqlalchemy.exc import IntegrityError
from sqlmodel import SQLModel, col, select

from labeling.database import Database, insert_or_nothing, now
from labeling.exchanges import link_due
from labeling.tables import Exchange, ExchangeRetention

log = structlog.get_logger(__name__)
BATCH = 500


async def forget_old_exchanges(database: Database, project: str, keep_days: int) -> int:
    """How many were deleted. 0 days keeps all."""
    if not keep_days:
        return 0
    before = now() - timedelta(days=keep_days)
    await link_due(database, project)
    deleted = looked = 0
    after: tuple[datetime, str] | None = None
    while page := await _old(database, project, before, after):
        looked += len(page)
        unneeded = [identity for _, identity, needed in page if not needed]
        deleted += await _delete(database, project, unneeded) if unneeded else 0
        after = page[-1][:2]
    await _count(database, project, needed=looked - deleted)
    if deleted:
        log.info("old_exchanges_deleted", project=project, deleted=deleted, needed=looked - deleted)
    return deleted


async def retention_counts(database: Database) -> list[ExchangeRetention]:
    async with database.read() as session:
        return list((await session.execute(select(ExchangeRetention))).scalars())


async def _old(
    database: Database, project: str, before: datetime, after: tuple[datetime, str] | None
) -> list[tuple[datetime, str, bool]]:
    """The next page by age: when, which, and whether something needs it by now."""
    keys = (col(Exchange.created_at), col(Exchange.id))
    old = select(*keys, _needed()).where(col(Exchange.project) == project, col(Exchange.created_at) < before)
    if after is not None:
        old = old.where(tuple_(*keys) > tuple_(*after))
    async with database.read() as session:
        page = await session.execute(old.order_by(*keys).limit(BATCH))
        return [(at, identity, needed) for at, identity, needed in page.all()]


async def _delete(database: Database, project: str, identities: list[str]) -> int:
    """Those that nothing needs. Where something came to need one at this very moment, all stay until the next look."""
    statement = delete(Exchange).where(col(Exchange.id).in_(identities), ~_needed())
    try:
        async with database.write() as session:
            result = await session.execute(statement.execution_options(synchronize_session=False))
            assert isinstance(result, CursorResult)
            await session.execute(insert_or_nothing(session, ExchangeRetention(project=project)))
            row = await session.get(ExchangeRetention, project, with_for_update=True)
            assert row is not None
            row.deleted += result.rowcount
            return result.rowcount
    except IntegrityError:
        return 0


def _needed() -> ColumnElement[bool]:
    """By any foreign key of any table."""
    keys = [key for table in SQLModel.metadata.tables.values() for key in table.foreign_keys]
    ours = [key.parent for key in keys if key.column.table.name == Exchange.__tablename__]
    return or_(*(exists().where(column == col(Exchange.id)) for column in ours))


async def _count(database: Database, project: str, needed: int) -> None:
    async with database.write() as session:
        await session.execute(insert_or_nothing(session, ExchangeRetention(project=project)))
        row = await session.get(ExchangeRetention, project, with_for_update=True)
        assert row is not None
        row.needed, row.looked_at = needed, now()
