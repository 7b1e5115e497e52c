"""A share of all captured exchanges into the queue, whether anybody said something of them or not.

What the rule draws becomes feedback of our own, under an id made of the exchange's: drawing again changes nothing.
"""

from __future__ import annotations

from sqlalchemy.ext.asyncio import AsyncSession
from sqlmodel import col, select

from labeling.database import Database, insert_or_nothing, new_id
from labeling.draws import in_share
from labeling.entry import SAMPLED, UNLIKELY
from labeling.exchanges import ROWS_PER_STATEMENT
from labeling.settings import EntrySettings
from labeling.tables import EntryProgress, Exchange, Feedback, FeedbackKind

EVERYTHING, LOW_LOG_PROBABILITY = "everything", "low_log_probability"
READ_AT_ONCE = 5000
SETTLED_MS = 120_000  # capture stores an exchange at most so long after it was given its id
OWN_SEVERITY = 0.3  # nobody has complained


async def sample(database: Database, project: str, entry: EntrySettings) -> int:
    """How many entered. From the moment on that the rule is first seen: the past is not drawn from."""
    drawn = 0
    while entry.everything:
        async with database.write() as session:
            ids = await next_ids(session, project, EVERYTHING)
            chosen = [one for one in ids if in_share(f"sample: {one}", entry.everything)]
            own = [own_flag(exchange, SAMPLED) for exchange in await _exchanges(session, chosen)]
            for start in range(0, len(own), ROWS_PER_STATEMENT):
                await session.execute(insert_or_nothing(session, *own[start : start + ROWS_PER_STATEMENT]))
            if ids:
                await move_on(session, project, EVERYTHING, ids[-1])
        drawn += len(own)
        if len(ids) < READ_AT_ONCE:
            break
    return drawn


async def next_ids(session: AsyncSession, project: str, rule: str) -> list[str]:
    """Of the oldest exchanges that the rule has not looked at; none at its first call, which only marks the place."""
    progress = await session.get(EntryProgress, (project, rule), with_for_update=True)
    settled = settled_id()
    if progress is None:
        await move_on(session, project, rule, settled)
        return []
    rows = (
        select(Exchange.id)
        .where(
            col(Exchange.project) == project,
            col(Exchange.id) > progress.exchange_id,
            col(Exchange.id) < settled,
        )
        .order_by(col(Exchange.id))
        .limit(READ_AT_ONCE)
    )
    return list((await session.execute(rows)).scalars())


async def _exchanges(session: AsyncSession, ids: list[str]) -> list[Exchange]:
    found: list[Exchange] = []
    for start in range(0, len(ids), ROWS_PER_STATEMENT):
        some = col(Exchange.id).in_(ids[start : start + ROWS_PER_STATEMENT])
        found += (await session.execute(select(Exchange).where(some))).scalars()
    return found


async def move_on(session: AsyncSession, project: str, rule: str, exchange_id: str) -> None:
    await session.merge(EntryProgress(project=project, rule=rule, exchange_id=exchange_id))


def settled_id() -> str:
    """Greater than the id of every exchange that is surely stored by now."""
    prefix, _, number = new_id("ex").partition("_")
    return f"{prefix}_{int(number[:11], 16) - SETTLED_MS:011x}"


def own_flag(exchange: Exchange, kind: str) -> Feedback:
    """A flag by ourselves; `kind`: SAMPLED or UNLIKELY."""
    reasons = {SAMPLED: "drawn from all traffic", UNLIKELY: "low log-probability"}
    return Feedback(
        id=f"{kind}{exchange.id}",
        project=exchange.project,
        kind=FeedbackKind.FLAG,
        exchange_id=exchange.id,
        completion_id=exchange.completion_id,
        reasons=[reasons[kind]],
        severity=OWN_SEVERITY,
    )
