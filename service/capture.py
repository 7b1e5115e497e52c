"""Exchanges on their way to the database: a bounded queue that never delays or fails an answer, and its one writer."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Any

import msgspec
import structlog
from sqlalchemy.exc import SQLAlchemyError

from labeling.database import Database, new_id, now
from labeling.errors import Unavailable
from labeling.exchanges import record_values
from labeling.json_values import is_deeper
from labeling.tables import Exchange
from service.metrics import Metrics

log = structlog.get_logger(__name__)
BATCH = 200
WAITING_BYTES = 64 * 1024 * 1024  # long prompts must not fill the memory before the count of exchanges does
RETRY_SECONDS = 1.0
MESSAGE_FIELDS = frozenset({"messages", "prompt", "model", "stream", "stream_options"})

Values = dict[str, Any]  # of one exchange, by column


class NotRecordable(Exception):
    """An exchange without one readable prompt: several prompts at once, token ids, or JSON nested too deeply."""


@dataclass(frozen=True, slots=True)
class Captured:
    """Bytes as they passed; decoded by the writer, not on the request's path."""

    project: str
    completion_id: str
    served: str
    request: bytes
    response: bytes
    streamed: bool
    aborted: bool
    latency_ms: float
    request_id: str | None
    session_id: str | None
    key_id: str
    created_at: datetime = field(default_factory=now)

    @property
    def size(self) -> int:
        return len(self.request) + len(self.response)


class CaptureQueue:
    def __init__(self, limit: int, metrics: Metrics) -> None:
        self._queue: asyncio.Queue[Captured] = asyncio.Queue(limit)
        self._metrics = metrics
        self._bytes = 0
        self._logged_at = -60.0

    def offer(self, captured: Captured) -> None:
        """Takes it, or drops and counts it."""
        if self._queue.full() or self._bytes + captured.size > WAITING_BYTES:
            self.drop("queue_full")
            return
        self._queue.put_nowait(captured)
        self._bytes += captured.size

    def waiting(self) -> int:
        return self._queue.qsize()

    async def run(self, database: Database) -> None:
        """The writer, until it is cancelled."""
        while True:
            batch = await self._take()
            rows = list(self._rows(batch))
            await self._store(database, rows)
            for _ in batch:
                self._queue.task_done()

    async def drained(self) -> None:
        """Until all that was offered is stored or dropped."""
        await self._queue.join()

    async def _take(self) -> list[Captured]:
        batch = [await self._queue.get()]
        while len(batch) < BATCH and not self._queue.empty():
            batch.append(self._queue.get_nowait())
        self._bytes -= sum(captured.size for captured in batch)
        return batch

    def _rows(self, batch: list[Captured]) -> Iterator[Values]:
        for captured in batch:
            try:
                yield exchange_values(captured)
            except NotRecordable:
                self.drop("not_one_prompt")
            except (msgspec.MsgspecError, RecursionError, UnicodeError, LookupError, TypeError, AttributeError):
                # A shape that neither OpenAI nor vLLM documents; the answer went out all the same.
                self.drop("unreadable")

    async def _store(self, database: Database, rows: list[Values]) -> None:
        """Waits for a database that is down (the queue fills meanwhile); a row that it refuses is dropped alone."""
        while rows:
            try:
                async with database.write() as session:
                    self._metrics.captured.inc(await record_values(session, rows))
                return
            except Unavailable as error:
                self._warn("capture_waits", error=str(error))
                await asyncio.sleep(RETRY_SECONDS)
            except SQLAlchemyError as error:
                if len(rows) == 1:
                    self.drop("refused_by_database", error=str(error)[:300])
                    return
                for row in rows:
                    await self._store(database, [row])
                return

    def drop(self, reason: str, **detail: Any) -> None:
        self._metrics.capture_dropped.labels(reason).inc()
        self._warn("exchange_not_captured", reason=reason, **detail)

    def _warn(self, event: str, **detail: Any) -> None:
        """One line a minute at most: under overload the counter tells how many."""
        if time.monotonic() - self._logged_at >= 60:
            self._logged_at = time.monotonic()
            log.warning(event, **detail)


def exchange_of(captured: Captured) -> Exchange:
    return Exchange(**exchange_values(captured))


def exchange_values(captured: Captured) -> Values:
    """All columns of its row."""
    request = msgspec.json.decode(captured.request)
    if is_deeper(request):
        raise NotRecordable
    answer = _streamed(captured.response) if captured.streamed else _whole(msgspec.json.decode(captured.response))
    return {
        "id": new_id("ex"),
        "project": captured.project,
        "completion_id": captured.completion_id,
        "request_id": captured.request_id,
        "session_id": captured.session_id,
        "served": captured.served,
        "messages": _messages(request, chat=not captured.completion_id.startswith("cmpl-")),
        "parameters": {key: value for key, value in request.items() if key not in MESSAGE_FIELDS},
        "answers": [choice.text() for choice in answer],
        "finish_reason": "aborted" if captured.aborted else next((c.finish for c in answer if c.finish), None),
        "streamed": captured.streamed,
        "key_id": captured.key_id,
        "latency_ms": captured.latency_ms,
        # Of the request, not its end.
        "created_at": captured.created_at - timedelta(milliseconds=captured.latency_ms),
    }


def _messages(request: dict[str, Any], *, chat: bool) -> list[dict[str, Any]]:
    messages = request.get("messages")
    if chat and isinstance(messages, list) and messages and all(isinstance(message, dict) for message in messages):
        return messages
    prompt = request.get("prompt")  # vLLM passes over fields that it does not know, `messages` here included
    if isinstance(prompt, list) and len(prompt) == 1:
        prompt = prompt[0]
    if not isinstance(prompt, str):
        raise NotRecordable
    return [{"role": "user", "content": prompt}]


@dataclass
class _Choice:
    parts: list[str] = field(default_factory=list)
    calls: dict[int, dict[str, str]] = field(default_factory=dict)
    finish: str | None = None

    def text(self) -> str:
        """What the user saw; where the model called tools instead, the calls as JSON."""
        text = "".join(self.parts)
        return text if text or not self.calls else msgspec.json.encode(list(self.calls.values())).decode()

    def add(self, choice: dict[str, Any]) -> None:
        said = choice.get("delta") or choice.get("message") or {"content": choice.get("text")}
        self.parts.append(said.get("content") or "")
        for position, call in enumerate(said.get("tool_calls") or ()):
            kept = self.calls.setdefault(call.get("index", position), {"name": "", "arguments": ""})
            for key in kept:
                kept[key] += call["function"].get(key) or ""
        self.finish = choice.get("finish_reason") or self.finish


def _whole(response: dict[str, Any]) -> list[_Choice]:
    return _collect([response])


def _streamed(response: bytes) -> list[_Choice]:
    events = (line[5:].strip() for line in response.split(b"\n") if line.startswith(b"data:"))
    return _collect([msgspec.json.decode(event) for event in events if event and event != b"[DONE]"])


def _collect(events: list[dict[str, Any]]) -> list[_Choice]:
    choices: dict[int, _Choice] = {}
    for event in events:
        for choice in event.get("choices", ()):
            choices.setdefault(choice["index"], _Choice()).add(choice)
    return [choices[index] for index in sorted(choices)]
