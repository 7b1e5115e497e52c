"""The durable acknowledgement: feedback waits in a bounded queue, one writer commits what waits in one transaction,
and only then is each sender answered.
"""

from __future__ import annotations

import asyncio
import hashlib
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import structlog
from sqlalchemy import delete
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.ext.asyncio import AsyncSession
from sqlmodel import col, select

from labeling.database import Database, insert_or_nothing, now
from labeling.errors import Conflict, InvalidInput, NightschoolError, Unavailable
from labeling.exchanges import link_new
from labeling.feedback_body import FeedbackBody
from labeling.tables import Feedback
from service.metrics import Metrics
from service.tables import IdempotentAnswer

log = structlog.get_logger(__name__)
BATCH = 256
REMEMBERED = timedelta(days=2)


class IngestFull(Unavailable):
    code = "ingest_full"
    default_hint = "Send it again after Retry-After seconds; nothing of it was kept."


class IngestClosing(Unavailable):
    code = "ingest_closing"
    default_hint = "Send it again after Retry-After seconds; nothing of it was kept."


class IdempotencyMismatch(InvalidInput):
    code = "idempotency_mismatch"
    default_hint = "Use a new Idempotency-Key for each new feedback."


class IdempotencyInFlight(Conflict):
    code = "idempotency_in_flight"
    default_hint = "Wait for the answer to the first request, or ask again in a second."


class Unstorable(InvalidInput):
    code = "unstorable_feedback"
    default_hint = "The database refuses a value in it; send plain text of ordinary length."


@dataclass(frozen=True)
class Once:
    """An Idempotency-Key of an API key, and what it was first used for."""

    key_id: str
    name: str
    body_digest: str

    @property
    def place(self) -> tuple[str, str]:
        return self.key_id, self.name

    @classmethod
    def of(cls, key_id: str, name: str, body: bytes) -> Once:
        return cls(key_id, name, hashlib.sha256(body).hexdigest())


@dataclass(frozen=True)
class _Entry:
    row: Feedback
    once: Once | None
    done: asyncio.Future[dict[str, Any]]


class IngestWriter:
    def __init__(self, database: Database, limit: int, metrics: Metrics) -> None:
        self._database = database
        self._queue: asyncio.Queue[_Entry] = asyncio.Queue(limit)
        self._in_flight: set[tuple[str, str]] = set()
        self._metrics = metrics

    async def submit(self, row: Feedback, once: Once | None = None) -> dict[str, Any]:
        """The answer, {"id", "linked"}, once the row is on disk."""
        if once is None:
            return await self._enqueue(row, None)
        if once.place in self._in_flight:
            raise IdempotencyInFlight(f"the first request with Idempotency-Key {once.name!r} is still being answered")
        self._in_flight.add(once.place)
        try:
            return await self._enqueue(row, once)
        finally:
            self._in_flight.discard(once.place)

    def waiting(self) -> int:
        return self._queue.qsize()

    async def run(self) -> None:
        """The writer, until it is cancelled; whatever waits then is told so."""
        try:
            while True:
                await self._write(await self._take())
        finally:
            while not self._queue.empty():
                _fail(self._queue.get_nowait(), IngestClosing("the service is stopping"))

    async def drained(self) -> None:
        await self._queue.join()

    async def _enqueue(self, row: Feedback, once: Once | None) -> dict[str, Any]:
        entry = _Entry(row, once, asyncio.get_running_loop().create_future())
        try:
            self._queue.put_nowait(entry)
        except asyncio.QueueFull:
            self._metrics.feedback_refused.labels(IngestFull.code).inc()
            raise IngestFull(f"{self._queue.maxsize} feedback wait for their commit already") from None
        # Shielded: a sender that hangs up must not cancel what a commit is about to settle.
        return await asyncio.shield(entry.done)

    async def _take(self) -> list[_Entry]:
        batch = [await self._queue.get()]
        while len(batch) < BATCH and not self._queue.empty():
            batch.append(self._queue.get_nowait())
        return batch

    async def _write(self, batch: list[_Entry]) -> None:
        try:
            await self._settle(batch)
        except asyncio.CancelledError:
            for entry in batch:
                _fail(entry, IngestClosing("the service is stopping"))
            raise
        except Exception as error:
            log.error("feedback_not_committed", rows=len(batch), exc_info=error)
            for entry in batch:
                _fail(entry, error)
        finally:
            for _ in batch:
                self._queue.task_done()

    async def _settle(self, batch: list[_Entry]) -> None:
        try:
            answers = await self._commit(batch)
        except Unavailable as error:
            self._metrics.feedback_refused.labels(error.code).inc(len(batch))
            answers = [error] * len(batch)
        except SQLAlchemyError as error:
            # One row that the database refuses must not take the others with it.
            answers = [await self._alone(entry, error, len(batch)) for entry in batch]
        for entry, answer in zip(batch, answers, strict=True):
            _resolve(entry, answer)

    async def _alone(self, entry: _Entry, error: SQLAlchemyError, of: int) -> dict[str, Any] | NightschoolError:
        if of > 1:
            try:
                return (await self._commit([entry]))[0]
            except Unavailable as unavailable:
                return unavailable
            except SQLAlchemyError as again:
                error = again
        log.warning("feedback_refused_by_database", error=str(error)[:300])
        self._metrics.feedback_refused.labels(Unstorable.code).inc()
        return Unstorable("the database refused this feedback")

    async def _commit(self, batch: list[_Entry]) -> list[dict[str, Any] | NightschoolError]:
        """One transaction; an Idempotency-Key that was used before is answered as then and adds no row."""
        async with self._database.write() as session:
            await link_new(session, [entry.row for entry in batch])
            earlier = await _claim(session, batch)
            fresh = [
                entry.row for entry in batch if not (entry.once and (entry.once.key_id, entry.once.name) in earlier)
            ]
            if fresh:
                await session.execute(insert_or_nothing(session, *fresh))
        self._metrics.commits.observe(len(batch))
        for row in fresh:
            self._metrics.feedback.labels(row.project, row.kind.value).inc()
        return [_answer(entry, earlier) for entry in batch]


async def _claim(session: AsyncSession, batch: list[_Entry]) -> dict[tuple[str, str], IdempotentAnswer]:
    """Remembers the answers to keys used for the first time; returns what others were answered with."""
    claims = sorted((c for c in map(_claim_row, batch) if c), key=lambda c: (c.key_id, c.idempotency_key))
    if not claims:
        return {}
    table = IdempotentAnswer
    statement = insert_or_nothing(session, *claims).returning(col(table.key_id), col(table.idempotency_key))
    won = {(key_id, name) for key_id, name in (await session.execute(statement)).all()}
    lost = [claim for claim in claims if (claim.key_id, claim.idempotency_key) not in won]
    if not lost:
        return {}
    names = col(table.idempotency_key).in_([claim.idempotency_key for claim in lost])
    known = (await session.execute(select(table).where(names))).scalars().all()
    wanted = {(claim.key_id, claim.idempotency_key) for claim in lost}
    return {(k.key_id, k.idempotency_key): k for k in known if (k.key_id, k.idempotency_key) in wanted}


async def forget_answers(database: Database) -> None:
    """Idempotency-Keys are good for two days: longer than any client repeats a request."""
    async with database.write() as session:
        await session.execute(delete(IdempotentAnswer).where(col(IdempotentAnswer.created_at) < now() - REMEMBERED))


def _claim_row(entry: _Entry) -> IdempotentAnswer | None:
    once = entry.once
    if once is None:
        return None
    return IdempotentAnswer(
        key_id=once.key_id,
        idempotency_key=once.name,
        body_digest=once.body_digest,
        status=202,
        answer=_receipt(entry.row),
    )


def _answer(entry: _Entry, earlier: dict[tuple[str, str], IdempotentAnswer]) -> dict[str, Any] | NightschoolError:
    known = earlier.get(entry.once.place) if entry.once else None
    if known is None or entry.once is None:
        return _receipt(entry.row)
    if known.body_digest != entry.once.body_digest:
        return IdempotencyMismatch(f"Idempotency-Key {entry.once.name!r} was used for another body")
    return known.answer


def _receipt(row: Feedback) -> dict[str, Any]:
    return {"id": row.id, "linked": row.exchange_id is not None}


def _resolve(entry: _Entry, answer: dict[str, Any] | NightschoolError) -> None:
    if isinstance(answer, NightschoolError):
        _fail(entry, answer)
    elif not entry.done.done():
        entry.done.set_result(answer)


def _fail(entry: _Entry, error: Exception) -> None:
    if not entry.done.done():
        entry.done.set_exception(error)
        entry.done.exception()  # its sender may have hung up: seen, so that the loop does not complain


def feedback_row(body: FeedbackBody, project: str, key_id: str) -> Feedback:
    return Feedback(
        project=project,
        kind=body.kind,
        completion_id=body.exchange_id,
        request_id=body.request_id,
        session_id=body.session_id,
        choice=body.choice,
        value=body.value,
        reasons=body.reasons,
        severity=body.severity,
        comment=body.comment,
        reporter=body.reporter,
        tags=body.tags,
        messages=body.messages,
        answer=body.answer,
        key_id=key_id,
    )
