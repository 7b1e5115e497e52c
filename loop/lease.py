"""One training run at a time: a lease row with heartbeat and a fencing token that only grows.

A holder that was paused past its lease (swap, SIGSTOP) finds its token outdated at the next write and stops.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import timedelta
from typing import cast

import structlog
from sqlalchemy import update
from sqlalchemy.engine import CursorResult
from sqlalchemy.ext.asyncio import AsyncSession
from sqlmodel import col

from labeling.database import Database, insert_or_nothing, now
from labeling.errors import Conflict, Unavailable
from loop.tables import Lease

log = structlog.get_logger()


class LeaseHeld(Conflict):
    code = "lease_held"
    default_hint = "Another night is running; this one starts by itself when that has ended."


class LeaseLost(Conflict):
    """Somebody else holds the lease now; whatever this holder was doing must not be recorded."""

    code = "lease_lost"
    default_hint = "`nightschool night run --resume` continues where the night stood."


async def acquire(database: Database, name: str, holder: str, seconds: float) -> int:
    """Takes a free or expired lease and returns its new token; LeaseHeld otherwise."""
    async with database.write() as session:
        await session.execute(insert_or_nothing(session, Lease(name=name, expires_at=now())))
        taken = await session.execute(
            update(Lease)
            .where(col(Lease.name) == name, col(Lease.expires_at) <= now())
            .values(holder=holder, token=col(Lease.token) + 1, expires_at=now() + timedelta(seconds=seconds))
        )
        lease = await session.get(Lease, name, populate_existing=True)
    assert lease is not None
    if cast("CursorResult[object]", taken).rowcount != 1:
        raise LeaseHeld(f"{lease.holder} holds {name!r} until {lease.expires_at:%H:%M:%S} UTC")
    return lease.token


async def require(session: AsyncSession, name: str, token: int) -> None:
    """Inside the caller's transaction: LeaseLost unless `token` is still the newest."""
    kept = await session.execute(
        update(Lease).where(col(Lease.name) == name, col(Lease.token) == token).values(token=token)
    )
    if cast("CursorResult[object]", kept).rowcount != 1:
        raise LeaseLost(f"the lease {name!r} was taken over by a newer holder")


async def release(database: Database, name: str, token: int) -> None:
    async with database.write() as session:
        await session.execute(
            update(Lease).where(col(Lease.name) == name, col(Lease.token) == token).values(holder="", expires_at=now())
        )


async def free_all(database: Database) -> None:
    """For a process that knows to be the only one: whoever held a lease is dead, and need not be waited for."""
    async with database.write() as session:
        await session.execute(update(Lease).values(holder="", expires_at=now()))


@asynccontextmanager
async def renewed(database: Database, name: str, token: int, seconds: float) -> AsyncIterator[None]:
    """Keeps an acquired lease by a heartbeat each third of `seconds`, then releases it; LeaseLost ends the body."""
    body = asyncio.current_task()
    assert body is not None
    lost = asyncio.Event()
    beat = asyncio.create_task(_heartbeat(database, name, token, seconds, body, lost), name=f"lease {name}")
    try:
        yield
    except asyncio.CancelledError:
        if not lost.is_set():
            raise
        body.uncancel()  # our own: the caller's task goes on with other work
        raise LeaseLost(f"the lease {name!r} was taken over by a newer holder") from None
    finally:
        beat.cancel()
        await asyncio.gather(beat, return_exceptions=True)
        with contextlib.suppress(Unavailable):  # it runs out by itself; the body's own end must not be hidden
            await release(database, name, token)


async def _heartbeat(
    database: Database, name: str, token: int, seconds: float, body: asyncio.Task[object], lost: asyncio.Event
) -> None:
    while True:
        await asyncio.sleep(seconds / 3)
        try:
            async with database.write() as session:
                await require(session, name, token)
                await session.execute(
                    update(Lease)
                    .where(col(Lease.name) == name, col(Lease.token) == token)
                    .values(expires_at=now() + timedelta(seconds=seconds))
                )
        except LeaseLost:
            log.error("lease_lost", lease=name, token=token)
            lost.set()
            body.cancel("lease lost")
            return
        except Unavailable as error:  # the next beat may find the database back before the lease ends
            log.warning("lease_heartbeat_failed", lease=name, error=str(error))
