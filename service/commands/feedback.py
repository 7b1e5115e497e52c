"""`nightschool feedback unlinked`: what named an exchange that never came."""

from __future__ import annotations

import json
from datetime import timedelta
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Column, Table

from service.commands.local_api import Api, with_api


def unlinked(path: Path, *, project: str | None, limit: int, as_json: bool) -> None:
    async def body(api: Api) -> None:
        found = await api.call("GET", f"/v1/projects/{api.project(project)}/feedback/unlinked", limit=limit)
        if as_json:
            print(json.dumps(found, indent=1))
            return
        if not found["total"]:
            print("All feedback has its exchange.")
            return
        table = Table(Column("id", no_wrap=True), "kind", "named", "age", "comment")
        for row in found["feedback"]:
            named = ", ".join(f"{key} {value}" for key, value in row["named"].items())
            age = str(timedelta(seconds=row["age_seconds"]))
            table.add_row(*map(escape, (row["id"], row["kind"], named, age, (row["comment"] or "")[:80])))
        Console().print(table)
        print(f"{found['total']} in all; each is linked should its exchange still come.")

    with_api(path, body)
