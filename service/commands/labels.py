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
    _listed(path, "held", project, as_json, ("id", "id"), ("correction", "correction"), "No label is held back.")


def refused(path: Path, *, project: str | None, as_json: bool) -> None:
    _listed(path, "refused", project, as_json, ("task", "task"), ("why refused", "reason"), "No label is refused.")


def _listed(
    path: Path, which: str, project: str | None, as_json: bool, key: tuple[str, str], said: tuple[str, str], none: str
) -> None:
    """`key` and `said`: a column's title and the field that fills it."""

    async def body(api: Api) -> None:
        rows = await api.call("GET", f"/v1/projects/{api.project(project)}/labels/{which}")
        if as_json:
            print(json.dumps(rows, indent=1))
            return
        table = Table(Column(key[0], no_wrap=True), "prompt", said[0], "by")
        for row in rows:
            prompt = content_text(row["prompt"][-1].get("content"))
            cells = (str(row[key[1]] or ""), prompt, row[said[1]] or "", ", ".join(row["annotators"]))
            table.add_row(*map(escape, cells))
        Console().print(table if rows else none)

    with_api(path, body)


def archived(path: Path, *, project: str | None) -> None:
    """JSON lines that Label Studio imports; page by page, so that a long history fits."""

    async def body(api: Api) -> None:
        address, after = f"/v1/projects/{api.project(project)}/labels/archived", ""
        while tasks := await api.call("GET", address, after=after):
            for task in tasks:
                print(json.dumps(task))
            after = tasks[-1]["item_id"]

    with_api(path, body)


def confirm(path: Path, label_ids: list[str], *, project: str | None) -> None:
    async def body(api: Api) -> None:
        done = await api.call("POST", f"/v1/projects/{api.project(project)}/labels/confirm", {"label_ids": label_ids})
        print(f"{done['confirmed']} labels train again.")

    with_api(path, body)
