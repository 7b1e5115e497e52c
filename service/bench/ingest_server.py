"""The feedback route in one of the ways that the bench compares: `python -m service.bench.ingest_server MODE URL`.

Prints its port and one API key as JSON once it accepts; ends with its stdin.
"""

from __future__ import annotations

import asyncio
import json
import sys
from dataclasses import replace
from enum import StrEnum
from pathlib import Path

import uvicorn
import uvloop

from labeling.database import Database
from service import installation, logging
from service.app import AppState, assemble, create_app
from service.auth import create_key
from service.idempotency import Answer
from service.ingest import IngestWriter, Submission
from service.settings import Settings

PROJECT = "bench"


class Mode(StrEnum):
    DURABLE = "durable"  # as the product does it
    PER_ROW = "per_row"  # one commit a request
    ACK_FIRST = "ack_first"  # the same writer; the answer goes out before the write
    NO_STORAGE = "no_storage"


class AckFirst(IngestWriter):
    """Loses what it acknowledged when the process dies. Waits where the queue is full, as TCP would make it."""

    async def submit(self, submission: Submission) -> Answer:
        while self.waiting() >= self.limit:  # noqa: ASYNC110 - the bench's own baseline
            await asyncio.sleep(0.001)
        self.enqueue(submission)
        return submission.answer(submission.rows)


class NoStorage(IngestWriter):
    async def submit(self, submission: Submission) -> Answer:
        return submission.answer(submission.rows)


def settings_for(data_dir: Path) -> Settings:
    project = {"name": PROJECT, "base_dir": str(data_dir), "base_name": "base"}
    return Settings.model_validate({"data_dir": data_dir, "projects": [project], "http": {"port": 0}})


def with_mode(state: AppState, mode: Mode, settings: Settings) -> AppState:
    limit, metrics = settings.http.ingest_queue, state.metrics
    match mode:
        case Mode.DURABLE:
            return state
        case Mode.PER_ROW:
            return replace(state, ingest=IngestWriter(state.database, limit, metrics, batch=1))
        case Mode.ACK_FIRST:
            return replace(state, ingest=AckFirst(state.database, limit, metrics))
        case Mode.NO_STORAGE:
            return replace(state, ingest=NoStorage(state.database, limit, metrics))


async def serve(mode: Mode, url: str) -> None:
    settings = settings_for(Path.cwd())
    database = Database(url)
    _, key = await create_key(database, mode, ["feedback"], PROJECT)
    state = with_mode(assemble(settings, database, []), mode, settings)
    listener = installation.listen(settings)
    app = create_app(settings, state)
    config = uvicorn.Config(app, log_config=None, access_log=False, lifespan="on", timeout_graceful_shutdown=2)
    server = uvicorn.Server(config)
    task = asyncio.create_task(server.serve([listener]))
    while not server.started:  # noqa: ASYNC110 - uvicorn has no event for it
        await asyncio.sleep(0.01)
    print(json.dumps({"port": listener.getsockname()[1], "key": key}), flush=True)
    await asyncio.to_thread(sys.stdin.read)
    server.should_exit = True
    await task
    await database.close()


if __name__ == "__main__":
    logging.configure(json=True)
    uvloop.run(serve(Mode(sys.argv[1]), sys.argv[2]))
