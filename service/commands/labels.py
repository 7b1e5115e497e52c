"""`nightschool labels refused | held | confirm`: what labellers have to mend, and what a rejected night used."""

from __future__ import annotations

import json
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Column, Table

from labeling.labeling_screen import content_text
from service.commands.local_api import Api, with_api


def held(path: Path, *, project: str | None, as_json: bool) -> None:
    async def body(api: Api) -> None:
        rows = await api.call("GET", f"/v1/projects/{api.project(project)}/labels/held")
        if as_json:
            print(json.dumps(rows, indent=1))
            return
        table = Table(Column("id", no_wrap=True), "prompt", "correction", "by")
        for row in rows:
            prompt = content_text(row["prompt"][-1].get("content"))
            table.add_row(*map(escape, (row["id"], prompt, row["correction"] or "", ", ".join(row["annotators"]))))
        Console().print(table if rows else "No label is held back.")

    with_api(path, body)


def refused(path: Path, *, project: str | None, as_json: bool) -> None:
    async def body(api: Api) -> None:
        rows = await api.call("GET", f"/v1/projects/{api.project(project)}/labels/refused")
        if as_json:
            print(json.dumps(rows, indent=1))
            return
        table = Table(Column("task", no_wrap=True), "prompt", "why refused", "by")
        for row in rows:
            prompt = content_text(row["prompt"][-1].get("content"))
            table.add_row(
                *map(escape, (str(row["task"] or ""), prompt, row["reason"] or "", ", ".join(row["annotators"])))
            )
        Console().print(table if rows else "No label is refused.")

    with_api(path, body)


def confirm(path: Path, label_ids: list[str], *, project: str | None) -> None:
    async def body(api: Api) -> None:
        done = await api.call("POST", f"/v1/projects/{api.project(project)}/labels/confirm", {"label_ids": label_ids})
        print(f"{done['confirmed']} labels train again.")

    with_api(path, body)
