"""The move to `promoting`, from `awaiting_approval` or, forwards again, from ROLLED_BACK: who said so, and why."""

from __future__ import annotations

from sqlalchemy import delete
from sqlalchemy.ext.asyncio import AsyncSession
from sqlmodel import col

from loop import states
from loop.tables import NightState, StageMarker

PROMOTION_STAGES = ("load", "probe", "switch", "drain")  # those of loop.nightly.PROMOTE; a test compares


async def begin(session: AsyncSession, night_id: str, *, by: str, why: str) -> None:
    """In the caller's transaction; WrongState when the night awaits nothing. A worker then runs PROMOTE.

    Markers of an earlier promotion do not count: every replica is loaded and probed anew.
    """
    await states.move(session, night_id, NightState.PROMOTING, approved_by=by, approved_why=why)
    await session.execute(
        delete(StageMarker).where(col(StageMarker.night_id) == night_id, col(StageMarker.stage).in_(PROMOTION_STAGES))
    )
