"""The product's HTTP application in a process of its own: keys checked, alias resolved, capture into an SQLite file.

`python -m service.bench.own_gateway PORT ENGINE_URL FOLDER`; the API key lies in FOLDER/key when it serves.
"""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path

import uvloop

from labeling.database import Database
from service import logging, migrations
from service.app import assemble, create_app
from service.auth import create_key
from service.installation import listen, serving
from service.settings import Settings

PROJECT, BASE = "support-bot", "base"


async def serve(settings: Settings) -> None:
    folder = settings.data_dir
    await asyncio.to_thread(migrations.upgrade, settings.database_url)
    database = Database(settings.database_url)
    _, key = await create_key(database, "bench", ["inference", "feedback"], PROJECT)
    (folder / "key").write_text(key, encoding="utf-8")
    with listen(settings) as listener:
        async with serving(create_app(settings, assemble(settings, database)), settings.http, listener):
            await asyncio.Event().wait()


def settings_for(port: int, engine: str, folder: Path) -> Settings:
    """All that is not named here is the product's default."""
    return Settings.model_validate(
        {
            "data_dir": folder,
            "http": {"port": port},
            "vllm": {"replicas": [{"url": engine}]},
            "projects": [{"name": PROJECT, "base_dir": folder, "base_name": BASE}],
        }
    )


if __name__ == "__main__":
    logging.configure(json=True)
    uvloop.run(serve(settings_for(int(sys.argv[1]), sys.argv[2], Path(sys.argv[3]))))
