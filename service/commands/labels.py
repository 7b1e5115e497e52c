"""`nightschool labels …`: what was accepted, what labellers have to mend, how well they label, and their screen."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

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


def accepted(path: Path, *, project: str | None, as_json: bool) -> None:
    """All of them: page after page."""

    async def body(api: Api) -> None:
        address, rows, after = f"/v1/projects/{api.project(project)}/labels", [], ""
        while page := await api.call("GET", address, after=after):
            rows += page
            after = page[-1]["id"]
        if as_json:
            print(json.dumps(rows, indent=1))
            return
        table = Table(Column("id", no_wrap=True), "prompt", "verdict", "chosen", "by", "said by", "accepted")
        for row in rows:
            said = (row["verdict"], row["chosen"] or "", ", ".join(row["annotators"]), str(row["overlap"]))
            prompt = content_text(row["prompt"][-1].get("content"))
            table.add_row(*map(escape, (row["id"], prompt, *said, row["accepted_at"])))
        Console().print(table if rows else "No label is accepted yet.")

    with_api(path, body)


def annotators(path: Path, *, project: str | None, as_json: bool) -> None:
    async def body(api: Api) -> None:
        report = await api.call("GET", f"/v1/projects/{api.project(project)}/labels/annotators")
        if as_json:
            print(json.dumps(report, indent=1))
            return
        console = Console()
        columns = ("labels", "alone", "refused", "disputed", "waiting", "skipped", "agreement", "gold", "seconds")
        table = Table(Column("annotator", no_wrap=True), *columns, "second opinion because")
        for row in report["annotators"]:
            table.add_row(*map(escape, _annotator_cells(row)))
        console.print(table if report["annotators"] else "Nobody has labelled yet.")
        alpha = report["verdict_alpha"]
        if alpha is not None:
            items = report["items_by_several_people"]
            console.print(f"Verdicts of {items} items by several people: Krippendorff's alpha {alpha:.2f}.")

    with_api(path, body)


def _annotator_cells(row: dict[str, Any]) -> tuple[str, ...]:
    counts = ("accepted", "accepted_alone", "refused", "disputed", "waiting", "skipped")
    agreement = "" if row["agreement"] is None else f"{row['agreement']:.0%} of {row['compared']}"
    low, high = row["gold_interval"]
    gold = f"{row['gold_right']} of {row['gold_answers']} ({low:.0%} to {high:.0%})" if row["gold_answers"] else ""
    seconds = "" if row["median_seconds"] is None else f"{row['median_seconds']:.0f}"
    numbers = (str(row[name]) for name in counts)
    return row["annotator"], *numbers, agreement, gold, seconds, row["second_opinion_because"] or ""


def screen(path: Path, *, project: str | None, restore: bool) -> None:
    async def body(api: Api) -> None:
        method = "POST" if restore else "GET"
        found = await api.call(method, f"/v1/projects/{api.project(project)}/labels/screen")
        print(f"{found['detail']}." + (f"\n  {found['cure']}" if found["cure"] else ""))

    with_api(path, body)


def confirm(path: Path, label_ids: list[str], *, project: str | None) -> None:
    async def body(api: Api) -> None:
        done = await api.call("POST", f"/v1/projects/{api.project(project)}/labels/confirm", {"label_ids": label_ids})
        print(f"{done['confirmed']} labels train again.")

    with_api(path, body)
