"""Which feedback enters the queue, how much of it a day, and that what waits is neither lost nor forgotten."""

from __future__ import annotations

from collections import Counter
from datetime import timedelta
from typing import Any

from sqlalchemy import delete, update
from sqlmodel import col

from labeling.database import Database, new_id, now
from labeling.exchanges import record
from labeling.feedback import fold
from labeling.sampling import SETTLED_MS, settled_id
from labeling.settings import LabelingSettings
from labeling.tables import (
    EntryCount,
    EntryProgress,
    Exchange,
    Feedback,
    FeedbackKind,
    GoodAnswer,
    ItemMember,
    ReviewItem,
)
from tests.running import PROJECT, count, rows


def settings(**entry: Any) -> LabelingSettings:
    return LabelingSettings.model_validate({"held_out_share": 0, "entry": entry})


def feedback(text: str = "Why?", **columns: Any) -> Feedback:
    known = {"project": PROJECT, "kind": FeedbackKind.FLAG, "answer": "So."}
    return Feedback(**{**known, "messages": [{"role": "user", "content": text}], **columns})


async def store(database: Database, *stored: Any) -> None:
    async with database.write() as session:
        session.add_all(stored)


async def next_day(database: Database) -> None:
    """Nothing is counted for it yet, and what waits is due."""
    async with database.write() as session:
        await session.execute(delete(EntryCount))
        waits = col(Feedback.held_until).is_not(None)
        await session.execute(update(Feedback).where(waits).values(held_until=now() - timedelta(seconds=1)))


async def entries(database: Database) -> Counter[str | None]:
    return Counter(row.entry for row in await rows(database, Feedback))


async def test_shares_are_kept_by_hash(database: Database) -> None:
    """Half of the flags, no low rating, every correction; what is left out stays stored and is counted."""
    flags = [feedback(f"q{i}") for i in range(60)]
    low = feedback("low", kind=FeedbackKind.RATING, value=0)
    right = feedback("right", kind=FeedbackKind.CORRECTION, value="Right")
    await store(database, *flags, low, right)
    await fold(database, PROJECT, settings(flags=0.5, low_ratings=0))
    found = await entries(database)
    assert 15 < found["entered: flags"] < 45
    assert found["entered: flags"] + found["left out: flags"] == 60
    assert (found["left out: low_ratings"], found["entered: corrections"]) == (1, 1)
    assert await count(database, ReviewItem) == found["entered: flags"] + 1
    counted = {(row.scope, row.name): row.count for row in await rows(database, EntryCount)}
    assert counted["left out", "flags"] == found["left out: flags"]


async def test_tags_decide_before_all_else(database: Database) -> None:
    """One lets in even praise, another keeps even a flag out; the value counts unless it is a star."""
    chosen = settings(tags={"look": "*"}, leave_out_tags={"env": "test"})
    praise = feedback("praise", kind=FeedbackKind.RATING, value=1, tags={"look": "please"})
    await store(database, praise, feedback("trial", tags={"env": "test"}), feedback("real", tags={"env": "live"}))
    await fold(database, PROJECT, chosen)
    found = {item.messages[-1]["content"] for item in await rows(database, ReviewItem)}
    assert found == {"praise", "real"}
    assert await count(database, GoodAnswer) == 0


async def test_a_cap_holds_back_and_lets_in_the_next_day(database: Database) -> None:
    """The first of each reporter enter; the rest enters on later days, the oldest first; nothing is lost or doubled."""
    start = now() - timedelta(hours=1)
    mine = [feedback(f"mine {i}", reporter="me", created_at=start + timedelta(seconds=i)) for i in range(5)]
    await store(database, *mine, feedback("yours", reporter="you"), feedback("nobody's"))
    capped = settings(reporter_per_day=2)
    assert await fold(database, PROJECT, capped) == 4
    assert (await entries(database))["held back: reporter"] == 3
    assert await fold(database, PROJECT, capped) == 0, "not before the next day"
    seen = []
    for _ in range(2):
        await next_day(database)
        before = {item.id for item in await rows(database, ReviewItem)}
        await fold(database, PROJECT, capped)
        seen.append({i.messages[-1]["content"] for i in await rows(database, ReviewItem) if i.id not in before})
    assert seen == [{"mine 2", "mine 3"}, {"mine 4"}]
    assert await count(database, ItemMember) == 7
    assert (await entries(database))["held back: reporter"] == 0


async def test_caps_per_key_item_and_project(database: Database) -> None:
    """Each says by its name why it holds back."""
    await store(database, *(feedback(f"k{i}", key_id="key") for i in range(3)))
    await fold(database, PROJECT, settings(key_per_day=2))
    assert (await entries(database))["held back: key"] == 1
    await store(database, *(feedback("same") for _ in range(4)))
    await fold(database, PROJECT, settings(item_per_day=3))
    assert (await entries(database))["held back: item"] == 1
    (item,) = [one for one in await rows(database, ReviewItem) if one.messages[-1]["content"] == "same"]
    assert item.count == 3, "a flood on one question does not lift it further"
    await store(database, *(feedback(f"p{i}") for i in range(3)))
    await fold(database, PROJECT, settings(project_per_day=1))
    assert (await entries(database))["held back: project"] == 2


async def test_counts_of_caps_are_forgotten_when_their_day_is_over(database: Database) -> None:
    """A row a reporter and day would grow for ever; what rules have let in and left out is kept."""
    old = now().date() - timedelta(days=10)
    scopes = (("reporter", "me"), ("item", "it_1"), ("left out", "flags"), ("entered", "flags"))
    counts = [EntryCount(project=PROJECT, day=old, scope=scope, name=name, count=1) for scope, name in scopes]
    today = EntryCount(project=PROJECT, day=now().date(), scope="reporter", name="you", count=1)
    await store(database, *counts, today, feedback(reporter="me"))
    await fold(database, PROJECT, settings())
    left = {(row.scope, row.day == old) for row in await rows(database, EntryCount)}
    assert left == {("left out", True), ("entered", True), ("entered", False), ("reporter", False)}


async def test_a_share_of_everything(database: Database) -> None:
    """Exchanges nobody spoke of enter once, as feedback of our own; those before the rule was there don't."""
    rule = settings(everything=0.5)
    old = Exchange(**exchange("before"))
    async with database.write() as session:
        await record(session, [old])
    await fold(database, PROJECT, rule)  # the rule is seen for the first time: the place is marked
    mark = (await rows(database, EntryProgress))[0].exchange_id
    async with database.write() as session:
        await session.execute(update(EntryProgress).values(exchange_id=_earlier(mark, 10_000)))
        await record(session, [Exchange(id=_earlier(mark, i), **exchange(f"new {i}")) for i in range(1, 101)])
        await record(session, [Exchange(**exchange("may still be followed by earlier ones"))])
    for _ in range(2):
        await fold(database, PROJECT, rule)
    items = await rows(database, ReviewItem)
    assert 30 < len(items) < 70
    assert all(item.messages[-1]["content"].startswith("new") for item in items)
    assert {item.count for item in items} == {1}
    assert all(item.reasons == ["drawn from all traffic"] for item in items)
    assert (await entries(database))["entered: everything"] == len(items)


def _earlier(exchange_id: str, milliseconds: int) -> str:
    prefix, _, number = exchange_id.partition("_")
    return f"{prefix}_{int(number[:11], 16) - milliseconds:011x}{number[11:]}" + "0" * (16 - len(number[11:]))


def exchange(text: str) -> dict[str, Any]:
    messages = [{"role": "user", "content": text}]
    rest = {"completion_id": new_id("c"), "served": "base", "parameters": {}, "answers": ["So."]}
    return {"project": PROJECT, "messages": messages, **rest}


def test_settled_ids_are_those_of_two_minutes_ago() -> None:
    assert settled_id() < new_id("ex")
    ahead = int(new_id("ex")[3:14], 16) - int(settled_id()[3:14], 16)
    assert SETTLED_MS <= ahead < SETTLED_MS + 5_000
