"""The durable acknowledgement: feedback waits in a bounded queue, one writer commits what waits in one transaction,
and only then is each sender answered.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import structlog
from sqlalchemy import Connection
from sqlalchemy.exc import IntegrityError, SQLAlchemyError

from labeling.bulk import BulkInsert
from labeling.database import Database, TransactionLost
from labeling.errors import InvalidInput, NightschoolError, Unavailable
from labeling.exchanges import link, link_new
from labeling.feedback_body import FeedbackBody
from labeling.new_feedback import NewFeedback, new_feedback
from labeling.reporters import Reporters
from labeling.tables import Feedback
from service.idempotency import Answer, IdempotencyInFlight, Once, Place, claim
from service.metrics import Metrics

log = structlog.get_logger(__name__)
BATCH = 256  # rows of one commit, where no single request brings more
QUIET_TURNS = 3  # of the event loop: a request takes so many from its bytes to the queue
GATHER_SECONDS = 0.01
WAITING_BYTES = 64 * 1024 * 1024  # long bodies must not fill the memory before the count of rows does
TRIES = 3  # of a transaction that PostgreSQL gave up in favour of another


class IngestFull(Unavailable):
    code = "ingest_full"
    default_hint = "Send it again after Retry-After seconds; nothing of it was kept."


class IngestClosing(Unavailable):
    code = "ingest_closing"
    default_hint = "Send it again after Retry-After seconds; nothing of it was kept."


class Unstorable(InvalidInput):
    code = "unstorable_feedback"
    default_hint = "The database refuses a value in it; send plain text of ordinary length."


def receipt(row: NewFeedback) -> dict[str, Any]:
    return {"id": row.id, "linked": row.exchange_id is not None}


def accepted(rows: Sequence[NewFeedback]) -> Answer:
    """To a request with one feedback."""
    return Answer(202, receipt(rows[0]))


@dataclass(frozen=True, eq=False)
class Submission:
    """The feedback of one request: stored together or not at all. `answer` is called once links are known."""

    rows: Sequence[NewFeedback]
    once: Once | None = None
    size: int = 0  # bytes of its body
    answer: Callable[[Sequence[NewFeedback]], Answer] = accepted


Settled = Answer | NightschoolError


@dataclass(frozen=True, eq=False)
class _Entry:
    submission: Submission
    done: asyncio.Future[Answer]


class IngestWriter:
    """`limit` bounds the rows that wait, `batch` those of one commit."""

    def __init__(self, database: Database, limit: int, metrics: Metrics, batch: int = BATCH) -> None:
        self._database = database
        self.limit = limit
        self._batch = batch
        self._queue: asyncio.Queue[_Entry] = asyncio.Queue()
        self._rows = self._bytes = 0
        self._in_flight: set[Place] = set()
        self._metrics = metrics
        self._insert = BulkInsert(Feedback)

    async def submit(self, submission: Submission) -> Answer:
        """The answer, once the rows are on disk."""
        once = submission.once
        if once is not None and once.place in self._in_flight:
            raise IdempotencyInFlight(f"the first request with Idempotency-Key {once.name!r} is still being answered")
        settled = self.enqueue(submission)
        if once is not None:
            place = once.place
            self._in_flight.add(place)
            settled.add_done_callback(lambda _: self._in_flight.discard(place))
        # Shielded: the key of a sender that hangs up stays in flight until its row is stored or refused.
        return await asyncio.shield(settled)

    async def rehearse(self, rows: Sequence[NewFeedback]) -> list[bool]:
        """Whether each would be linked by now; nothing is stored."""
        async with self._database.read() as session:
            await link_new(session, rows)
            return [row.exchange_id is not None for row in rows]

    def waiting(self) -> int:
        return self._rows

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

    def enqueue(self, submission: Submission) -> asyncio.Future[Answer]:
        """For the writer's next commit, or IngestFull. `submit` waits for it, too."""
        rows, size = len(submission.rows), submission.size
        # One body that alone is over the bytes is taken when nothing else waits: refused, it could never be sent.
        if self._rows + rows > self.limit or (self._rows and self._bytes + size > WAITING_BYTES):
            self._metrics.feedback_refused.labels(IngestFull.code).inc(rows)
            raise IngestFull(f"{self._rows} feedback wait for their commit already")
        entry = _Entry(submission, asyncio.get_running_loop().create_future())
        self._queue.put_nowait(entry)
        self._rows += rows
        self._bytes += size
        return entry.done

    async def _take(self) -> list[_Entry]:
        """What waits, and what the event loop is reading already: those would only wait for the next commit.

        Alone, a request is held up by a few turns of an idle loop; under load by GATHER_SECONDS at most.
        """
        batch = [await self._queue.get()]
        rows, quiet = len(batch[0].submission.rows), 0
        ends = time.monotonic() + GATHER_SECONDS
        while rows < self._batch and quiet < QUIET_TURNS:
            quiet = quiet + 1 if self._queue.empty() else 0
            while rows < self._batch and not self._queue.empty():
                batch.append(self._queue.get_nowait())
                rows += len(batch[-1].submission.rows)
            if time.monotonic() > ends:
                break
            await asyncio.sleep(0)
        return batch

    async def _write(self, batch: list[_Entry]) -> None:
        settling = asyncio.ensure_future(self._settle(batch))
        try:
            await asyncio.shield(settling)
        except asyncio.CancelledError:
            await asyncio.wait((settling,))  # what is being committed is answered as it ends
            raise
        except Exception as error:
            log.error("feedback_not_committed", requests=len(batch), exc_info=error)
            for entry in batch:
                _fail(entry, error)
        finally:
            for entry in batch:
                self._rows -= len(entry.submission.rows)
                self._bytes -= entry.submission.size
                self._queue.task_done()

    async def _settle(self, batch: list[_Entry]) -> None:
        for entry, settled in zip(batch, await self._settled([e.submission for e in batch]), strict=True):
            _resolve(entry, settled)

    async def _settled(self, batch: list[Submission]) -> Sequence[Settled]:
        try:
            return await self._commit_again(batch)
        except Unavailable as error:
            self._refused(error, batch)
            return [error] * len(batch)
        except SQLAlchemyError as error:
            if len(batch) > 1:  # one that the database refuses must not take the others with it
                return [(await self._settled([one]))[0] for one in batch]
            # Not its text, which quotes the values.
            log.warning("feedback_refused_by_database", error=type(getattr(error, "orig", error)).__name__)
            unstorable = Unstorable("the database refused this feedback")
            self._refused(unstorable, batch)
            return [unstorable]

    def _refused(self, error: NightschoolError, batch: list[Submission]) -> None:
        self._metrics.feedback_refused.labels(error.code).inc(sum(len(one.rows) for one in batch))

    async def _commit_again(self, batch: list[Submission]) -> Sequence[Settled]:
        for _ in range(TRIES - 1):
            try:
                return await self._commit(batch)
            except (TransactionLost, IntegrityError) as error:  # the latter: an exchange that retention took meanwhile
                log.info("feedback_commit_repeated", error=type(error).__name__)
        return await self._commit(batch)

    async def _commit(self, batch: list[Submission]) -> Sequence[Settled]:
        settled, fresh = await self._database.transact(lambda connection: self._written(connection, batch))
        rows = [row for one in fresh for row in one.rows]
        self._metrics.commits.observe(len(rows))
        for (project, kind), count in Counter((row.project, row.kind.value) for row in rows).items():
            self._metrics.feedback.labels(project, kind).inc(count)
        return settled

    def _written(self, connection: Connection, batch: list[Submission]) -> tuple[Sequence[Settled], list[Submission]]:
        """An Idempotency-Key that was used before is answered as then and adds no row. Also which were stored."""
        link(connection, [row for one in batch for row in one.rows])
        answers = [one.answer(one.rows) for one in batch]
        named = [(one.once, answer) for one, answer in zip(batch, answers, strict=True) if one.once]
        earlier = claim(connection, named) if named else {}
        fresh = [one for one in batch if one.once is None or one.once.place not in earlier]
        self._insert(connection, [row for one in fresh for row in one.rows])
        settled = [
            one.once.repeat(earlier[one.once.place]) if one.once and one.once.place in earlier else answer
            for one, answer in zip(batch, answers, strict=True)
        ]
        return settled, fresh


def _resolve(entry: _Entry, settled: Settled) -> None:
    if isinstance(settled, NightschoolError):
        _fail(entry, settled)
    elif not entry.done.done():
        entry.done.set_result(settled)


def _fail(entry: _Entry, error: Exception) -> None:
    if not entry.done.done():
        entry.done.set_exception(error)
        entry.done.exception()  # its sender may have hung up: seen, so that the loop does not complain


def feedback_row(body: FeedbackBody, project: str, key_id: str, reporters: Reporters) -> Feedback:
    """For those who need a row of the ORM."""
    return Feedback(**vars(new_feedback(body, project, key_id, reporters)))
