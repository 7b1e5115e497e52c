"""Idempotency-Keys, as Stripe has them: scoped to the API key, the first answer stands, another body is refused.

The answer is remembered in the transaction that stores the rows, so there is never one without the other. Answers to
requests that stored nothing (a mistake in the body, overload) are not remembered: the key may be used again.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any

from sqlalchemy import Connection, delete
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
class Remembered:
    """The columns of IdempotentAnswer, in their order."""

    key_id: str
    idempotency_key: str
    body_digest: str
    status: int
    answer: dict[str, Any]
    created_at: datetime


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

    def repeat(self, known: Remembered) -> Answer | IdempotencyMismatch:
        if known.body_digest != self.body_digest:
            return IdempotencyMismatch(f"Idempotency-Key {self.name!r} was used for another body")
        return Answer(known.status, known.answer)


_insert = BulkInsert(IdempotentAnswer, returning=("key_id", "idempotency_key"))


def claim(connection: Connection, answers: Sequence[tuple[Once, Answer]]) -> dict[Place, Remembered]:
    """Remembers these answers; returns those that were remembered before, whose requests must store nothing.

    Another process that uses the same key waits here, on the unique key, until this transaction ends.
    """
    moment = now()
    claims = [
        Remembered(once.key_id, once.name, once.body_digest, answer.status, answer.body, moment)
        for once, answer in answers
    ]
    won = set(_insert(connection, claims))
    lost = {once.place for once, _ in answers} - won
    if not lost:
        return {}
    keys = {key_id for key_id, _ in lost}
    names = {name for _, name in lost}
    table = IdempotentAnswer
    known = select(*table.__table__.columns).where(  # type: ignore[attr-defined]  # every table=True model has one
        col(table.key_id).in_(sorted(keys)), col(table.idempotency_key).in_(sorted(names))
    )
    found = {(row.key_id, row.idempotency_key): Remembered(*row) for row in connection.execute(known)}
    return {place: found[place] for place in lost}


async def forget_answers(database: Database) -> None:
    """Keys are good for two days: longer than any client repeats a request."""
    async with database.write() as session:
        await session.execute(delete(IdempotentAnswer).where(col(IdempotentAnswer.created_at) < now() - REMEMBERED))
