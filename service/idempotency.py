"""Idempotency-Keys, as Stripe has them: scoped to the API key, the first answer stands, another body is refused.

The answer is remembered in the transaction that stores the rows, so there is never one without the other. Answers to
requests that stored nothing (a mistake in the body, overload) are not remembered: the key may be used again.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

from sqlalchemy import delete
from sqlalchemy.ext.asyncio import AsyncSession
from sqlmodel import col, select

from labeling.bulk import BulkInsert
from labeling.database import Database, now
from labeling.errors import Conflict, InvalidInput
from service.tables import IdempotentAnswer

REMEMBERED = timedelta(days=2)
MAX_LENGTH = 255
Place = tuple[str, str]


class IdempotencyMismatch(InvalidInput):
    code = "idempotency_mismatch"
    default_hint = "Use a new Idempotency-Key for each new request."


class IdempotencyInFlight(Conflict):
    code = "idempotency_in_flight"
    default_hint = "Wait for the answer to the first request, or ask again in a second."


class BadIdempotencyKey(InvalidInput):
    code = "bad_idempotency_key"
    default_hint = f"Send 1 to {MAX_LENGTH} visible ASCII characters, such as a UUID."


@dataclass(frozen=True)
class Answer:
    """What a request is answered with."""

    status: int
    body: dict[str, Any]


@dataclass(frozen=True)
class Once:
    """An Idempotency-Key of an API key, and what it was first used for."""

    key_id: str
    name: str
    body_digest: str

    @property
    def place(self) -> Place:
        return self.key_id, self.name

    @classmethod
    def of(cls, key_id: str, name: str | None, form: str, body: bytes) -> Once | None:
        """`form` tells apart what the same bytes may mean: the route and the content type."""
        if name is None:
            return None
        if not 0 < len(name) <= MAX_LENGTH or not (name.isascii() and name.isprintable()):
            raise BadIdempotencyKey(
                f"the Idempotency-Key has {len(name)} characters, or some that are not visible ASCII"
            )
        return cls(key_id, name, hashlib.sha256(form.encode() + b"\n" + body).hexdigest())

    def repeat(self, known: IdempotentAnswer) -> Answer | IdempotencyMismatch:
        if known.body_digest != self.body_digest:
            return IdempotencyMismatch(f"Idempotency-Key {self.name!r} was used for another body")
        return Answer(known.status, known.answer)


_insert = BulkInsert(IdempotentAnswer, returning=("key_id", "idempotency_key"))


async def claim(session: AsyncSession, answers: Sequence[tuple[Once, Answer]]) -> dict[Place, IdempotentAnswer]:
    """Remembers these answers; returns those that were remembered before, whose requests must store nothing.

    Another process that uses the same key waits here, on the unique key, until this transaction ends.
    """
    claims = [
        IdempotentAnswer(
            key_id=once.key_id,
            idempotency_key=once.name,
            body_digest=once.body_digest,
            status=answer.status,
            answer=answer.body,
        )
        for once, answer in answers
    ]
    won = set(await _insert(session, claims))
    lost = {once.place for once, _ in answers} - won
    if not lost:
        return {}
    keys = {key_id for key_id, _ in lost}
    names = {name for _, name in lost}
    table = IdempotentAnswer
    known = select(table).where(col(table.key_id).in_(sorted(keys)), col(table.idempotency_key).in_(sorted(names)))
    found = {(row.key_id, row.idempotency_key): row for row in (await session.execute(known)).scalars()}
    return {place: found[place] for place in lost}


async def forget_answers(database: Database) -> None:
    """Keys are good for two days: longer than any client repeats a request."""
    async with database.write() as session:
        await session.execute(delete(IdempotentAnswer).where(col(IdempotentAnswer.created_at) < now() - REMEMBERED))
