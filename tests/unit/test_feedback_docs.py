"""The commands of docs/feedback.md do what the page says, in a shell, against the service."""

from __future__ import annotations

import asyncio
import os
import re
from pathlib import Path

from labeling.database import Database
from labeling.tables import Feedback
from tests.running import count, service, settings_for

PAGE = Path(__file__).parents[2] / "docs" / "feedback.md"
STATUS = "curl() { command curl --silent --show-error --write-out '\\nstatus %{http_code}\\n' \"$@\"; }\n"


async def test_every_command_works(database: Database) -> None:
    """In the page's order: each is accepted, the one with a bad line in part."""
    commands = "\n".join(
        block for block in re.findall(r"```\n(.*?)```", PAGE.read_text(), re.DOTALL) if "curl" in block
    )
    async with service(database, settings_for([])) as running:
        environment = {**os.environ, "URL": running.url, "KEY": await running.key("feedback"), "no_proxy": "*"}
        shell = await asyncio.create_subprocess_exec(
            *("bash", "-euo", "pipefail", "-c", STATUS + commands),
            env=environment,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
        )
        said = (await shell.communicate())[0].decode()
    assert shell.returncode == 0, said
    assert re.findall(r"^status (\d+)$", said, re.MULTILINE) == [*["202"] * 5, "207", "200", "200"], said
    assert '"dry_run":true,"linked":false' in said
    assert await count(database, Feedback) == 7
