"""A night's states and the only moves between them. Code looks moves up here; docs are drawn from here."""

from __future__ import annotations

from typing import Any

from sqlalchemy import update
from sqlalchemy.engine import CursorResult
from sqlalchemy.ext.asyncio import AsyncSession
from sqlmodel import col

from labeling.database import now
from labeling.errors import Conflict
from loop.tables import Night, NightEvent
from loop.tables import NightState as S

MOVES: dict[S, frozenset[S]] = {
    S.CLAIMED: frozenset({S.RUNNING, S.FAILED}),
    S.RUNNING: frozenset({S.SKIPPED, S.FAILED, S.REJECTED, S.INCONCLUSIVE, S.AWAITING_APPROVAL}),
    S.FAILED: frozenset({S.RUNNING}),
    S.SKIPPED: frozenset({S.RUNNING}),
    S.AWAITING_APPROVAL: frozenset({S.PROMOTING, S.REFUSED, S.EXPIRED}),
    S.PROMOTING: frozenset({S.PROMOTED, S.FAILED, S.ROLLED_BACK}),
    S.PROMOTED: frozenset({S.ROLLED_BACK}),
    S.ROLLED_BACK: frozenset({S.PROMOTING}),
}
AT_WORK = frozenset({S.CLAIMED, S.RUNNING, S.PROMOTING})  # something is done on the night
DECISIONS = frozenset(state for state in S if state.value.isupper())


class WrongState(Conflict):
    code = "wrong_state"


def sources(target: S) -> frozenset[S]:
    """The states from which `target` may be reached."""
    return frozenset(state for state, targets in MOVES.items() if target in targets)


async def move(session: AsyncSession, night_id: str, target: S, **columns: Any) -> None:
    """UPDATE naming the allowed old states, and its event, in the caller's transaction; no row matched: WrongState."""
    allowed = sources(target)
    finished = {"finished_at": now()} if target in DECISIONS else {}
    result = await session.execute(
        update(Night)
        .where(col(Night.id) == night_id, col(Night.state).in_(allowed))
        .values(state=target, **finished, **columns)
    )
    assert isinstance(result, CursorResult)
    if result.rowcount != 1:
        night = await session.get(Night, night_id)
        seen = f"is {night.state}" if night else "does not exist"
        raise WrongState(
            f"night {night_id} {seen}; {target} can follow only {', '.join(sorted(allowed))}",
            hint="`nightschool night show` tells where it stands.",
        )
    session.add(
        NightEvent(night_id=night_id, kind="state", detail={"to": target, **{k: str(v) for k, v in columns.items()}})
    )
