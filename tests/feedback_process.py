"""The HTTP application in a process that can be killed: `python -m tests.feedback_process DATABASE_URL`.

For each line on stdin it forks a server (its imports are done already) and prints "PID PORT" once that accepts.
"""

from __future__ import annotations

import asyncio
import os
import socket
import sys

import uvicorn
import uvloop

from labeling.database import Database
from service.app import assemble, create_app
from tests.running import settings_for


async def serve(url: str, listener: socket.socket) -> None:
    settings = settings_for(["http://127.0.0.1:9"])
    app = create_app(settings, assemble(settings, Database(url)))
    server = uvicorn.Server(uvicorn.Config(app, lifespan="on", log_config=None))
    task = asyncio.create_task(server.serve([listener]))
    while not server.started:
        await asyncio.sleep(0.005)
    print(os.getpid(), listener.getsockname()[1], flush=True)
    await task


def main(url: str) -> None:
    for _ in sys.stdin:
        listener = socket.create_server(("127.0.0.1", 0))
        if os.fork() == 0:
            uvloop.run(serve(url, listener))
            os._exit(0)
        listener.close()
        os.wait()


if __name__ == "__main__":
    main(sys.argv[1])
