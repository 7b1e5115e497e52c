"""One holder at a time, and a holder that lost its lease can record nothing."""

from __future__ import annotations

import asyncio

import pytest

from labeling.database import Database
from loop import lease


async def test_two_at_once_and_one_gets_it(database: Database) -> None:
    """Of twenty that ask together exactly one holds the lease; the others learn who does."""
    taken = await asyncio.gather(
        *(lease.acquire(database, "training", f"w{i}", 30) for i in range(20)), return_exceptions=True
    )
    tokens = [token for token in taken if isinstance(token, int)]
    assert len(tokens) == 1
    assert all(isinstance(other, lease.LeaseHeld) for other in taken if not isinstance(other, int))


async def test_token_grows_with_each_holder(database: Database) -> None:
    """Released or expired, the next holder's token is higher."""
    first = await lease.acquire(database, "training", "a", 30)
    await lease.release(database, "training", first)
    second = await lease.acquire(database, "training", "b", 0.05)
    await asyncio.sleep(0.1)
    third = await lease.acquire(database, "training", "c", 30)
    assert first < second < third


async def test_an_outdated_token_is_refused(database: Database) -> None:
    """The paused holder of an expired lease fails inside its own transaction."""
    stale = await lease.acquire(database, "training", "a", 0.05)
    await asyncio.sleep(0.1)
    fresh = await lease.acquire(database, "training", "b", 30)
    with pytest.raises(lease.LeaseLost):
        async with database.write() as session:
            await lease.require(session, "training", stale)
    async with database.write() as session:
        await lease.require(session, "training", fresh)


async def test_releasing_an_outdated_lease_changes_nothing(database: Database) -> None:
    """A stale holder cannot free the lease of its successor."""
    stale = await lease.acquire(database, "training", "a", 0.05)
    await asyncio.sleep(0.1)
    await lease.acquire(database, "training", "b", 30)
    await lease.release(database, "training", stale)
    with pytest.raises(lease.LeaseHeld):
        await lease.acquire(database, "training", "c", 30)


async def test_the_heartbeat_keeps_the_lease_beyond_its_length(database: Database) -> None:
    """A body longer than the lease still holds it; after the body it is free."""
    token = await lease.acquire(database, "training", "a", 0.3)
    async with lease.renewed(database, "training", token, 0.3):
        await asyncio.sleep(0.8)
        with pytest.raises(lease.LeaseHeld):
            await lease.acquire(database, "training", "b", 30)
    assert await lease.acquire(database, "training", "b", 30) > token


async def test_an_only_process_need_not_wait_for_a_dead_holder(database: Database) -> None:
    """Freed at once, and the dead holder's token stays outdated."""
    dead = await lease.acquire(database, "training", "a", 3600)
    await lease.free_all(database)
    assert await lease.acquire(database, "training", "b", 30) > dead


async def test_a_lost_lease_ends_the_body_and_not_its_task(database: Database) -> None:
    """Whoever runs nights one after the other must live to run the next."""
    token = await lease.acquire(database, "training", "a", 0.3)
    with pytest.raises(lease.LeaseLost):
        async with lease.renewed(database, "training", token, 0.3):
            await lease.free_all(database)
            await lease.acquire(database, "training", "b", 30)
            await asyncio.sleep(5)
    await asyncio.sleep(0)  # a cancellation left over would come out here
    with pytest.raises(lease.LeaseHeld):
        await lease.acquire(database, "training", "c", 30)
