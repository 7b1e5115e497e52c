"""A night moves only along the table of states, and every move leaves an event."""

from __future__ import annotations

from datetime import date

import pytest
from sqlmodel import select

from labeling.database import Database, now
from loop.states import DECISIONS, MOVES, WrongState, move, sources
from loop.tables import Night, NightEvent, NightState


async def _night(database: Database, state: NightState) -> str:
    night = Night(project="p", date=date(2026, 1, 1), due_at=now(), state=state)
    async with database.write() as session:
        session.add(night)
    return night.id


@pytest.mark.parametrize("target", sorted(NightState))
async def test_only_named_sources_reach_a_state(database: Database, target: NightState) -> None:
    """From every state: a listed move succeeds with its event; any other changes nothing and says where it stands."""
    for number, source in enumerate(sorted(NightState)):
        night = Night(project=f"p{number}", date=date(2026, 1, 1), due_at=now(), state=source)
        async with database.write() as session:
            session.add(night)
        if target in MOVES.get(source, ()):
            async with database.write() as session:
                await move(session, night.id, target, reason="why")
        else:
            with pytest.raises(WrongState, match=f"is {source}"):
                async with database.write() as session:
                    await move(session, night.id, target)
        async with database.read() as session:
            seen = await session.get(Night, night.id)
            events = (await session.execute(select(NightEvent).where(NightEvent.night_id == night.id))).scalars().all()
        assert seen is not None
        moved = target in MOVES.get(source, ())
        assert seen.state == (target if moved else source)
        assert len(events) == (1 if moved else 0)
        assert (seen.finished_at is not None) == (moved and target in DECISIONS)


async def test_a_move_of_an_unknown_night_is_refused(database: Database) -> None:
    """The error names the night."""
    with pytest.raises(WrongState, match="nowhere does not exist"):
        async with database.write() as session:
            await move(session, "nowhere", NightState.RUNNING)


async def test_a_failed_transaction_leaves_neither_state_nor_event(database: Database) -> None:
    """State and event are one transaction."""
    night_id = await _night(database, NightState.CLAIMED)
    with pytest.raises(RuntimeError):
        async with database.write() as session:
            await move(session, night_id, NightState.RUNNING)
            raise RuntimeError
    async with database.read() as session:
        night = await session.get(Night, night_id)
        assert night is not None
        assert night.state == NightState.CLAIMED
        assert not (await session.execute(select(NightEvent))).scalars().all()


def test_every_state_can_be_reached_and_decisions_are_upper_case() -> None:
    """The table has no state that nothing leads to, but for the first."""
    assert {state for state in NightState if not sources(state)} == {NightState.CLAIMED}
    assert {str(state) for state in DECISIONS} == {str(s) for s in NightState if str(s).isupper()}
