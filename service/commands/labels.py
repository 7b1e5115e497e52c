"""`nightschool labels held | confirm`: what a rejected night used, and letting it train again."""

from __future__ import annotations

import json
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from labeling.labeling_screen import content_text
from service.commands.local_api import Api, with_api


def held(path: Path, *, project: str | None, as_json: bool) -> None:
    async def body(api: Api) -> None:
        rows = await api.call("GET", f"/v1/projects/{api.project(project)}/labels/held")
        if as_json:
            print(json.dumps(rows, indent=1))
            return
        table = Table("id", "prompt", "correction", "by")
        for row in rows:
            prompt = content_text(row["prompt"][-1].get("content"))
            table.add_row(*map(escape, (row["id"], prompt, row["correction"] or "", ", ".join(row["annotators"]))))
        Console().print(table if rows else "No label is held back.")

    with_api(path, body)


def confirm(path: Path, label_ids: list[str], *, project: str | None) -> None:
    async def body(api: Api) -> None:
        done = await api.call("POST", f"/v1/projects/{api.project(project)}/labels/confirm", {"label_ids": label_ids})
        print(f"{done['confirmed']} labels train again.")

    with_api(path, body)
