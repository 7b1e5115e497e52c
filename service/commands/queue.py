"""`nightschool queue report | next | withdraw`: what waits for labellers, why in that order, what choosing brought."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Column, Table

from service.commands.local_api import Api, in_path, with_api

PROMPT_SHOWN = 100
FACTORS = ("severity", "uncertainty", "novelty", "traffic")
WORDS = {"score": "by score ", "random": "at random"}


def report(path: Path, *, project: str | None, as_json: bool) -> None:
    async def body(api: Api) -> dict[str, Any]:
        found: dict[str, Any] = await api.call("GET", f"/v1/projects/{api.project(project)}/queue/report")
        return found

    found = with_api(path, body)
    if as_json:
        print(json.dumps(found, indent=1))
        return
    console = Console(soft_wrap=True)
    oldest = found["oldest"]
    age = f", the oldest for {oldest['hours']:g} hours" if oldest else ""
    console.print(f"[bold]{escape(found['project'])}[/]: {found['length']} items wait{age}")
    console.print(_states(found))
    for line in _entry(found["entry"]):
        console.print(escape(line))
    console.print(_lift(found))
    for name, part in (("corrections", found["corrections"]), ("fixes", found["fixes"])):
        console.print(escape(f"{name}: {part['verdict']}"))
    if found["fixes"]["unread"]:
        console.print(f"fixes: the exam rows of {found['fixes']['unread']} promoted nights are no longer there")


def _states(found: dict[str, Any]) -> Table:
    table = Table("items", *[Column(state, justify="right") for state in found["states"]])
    for chosen, states in found["chosen"].items():
        table.add_row(WORDS[chosen], *[str(states.get(state, 0)) for state in found["states"]])
    return table


def _entry(entry: dict[str, Any]) -> list[str]:
    lines = [
        f"{what}: {', '.join(f'{count} by {rule}' for rule, count in sorted(rules.items()))}"
        for what, rules in entry["counts"].items()
        if rules
    ]
    for cap, held in entry["held_back"].items():
        until = held["enters_from"][:16].replace("T", " ")
        lines.append(f"held back by the cap per {cap}: {held['waiting']}, which enter from {until} UTC on")
    return lines


def _lift(found: dict[str, Any]) -> Table:
    table = Table("of 100 labelled items", "by score", "at random", Column("lift", justify="right"), "difference, 95 %")
    named = {"gave a correction": found["corrections"], "are answered right by the next promoted": found["fixes"]}
    for name, part in named.items():
        between = part["difference"]
        cells = (_share(part["score"]), _share(part["random"]), f"{part['lift']:g}" if part["lift"] else "")
        table.add_row(name, *cells, _interval(between["interval"]) if between else "")
    return table


def _share(one: dict[str, Any]) -> str:
    if one["share"] is None:
        return "none yet"
    return f"{100 * one['share']:.0f} ({_interval(one['interval'])}), n = {one['n']}"


def _interval(ends: list[float]) -> str:
    return f"{100 * ends[0]:.0f} to {100 * ends[1]:.0f}"


def show_next(path: Path, *, project: str | None, limit: int, as_json: bool) -> None:
    async def body(api: Api) -> list[dict[str, Any]]:
        where = f"/v1/projects/{api.project(project)}/queue/next"
        found: list[dict[str, Any]] = await api.call("GET", where, limit=limit)
        return found

    rows = with_api(path, body)
    if as_json:
        print(json.dumps(rows, indent=1))
        return
    console = Console(soft_wrap=True, highlight=False)
    for row in rows:
        found = "  ".join(_factor(row, name) for name in FACTORS)
        console.print(f"[bold]{row['score']:.3f}[/] {WORDS[row['chosen']]}  {found} ({row['count']} reports)")
        console.print(f"      {row['id']}")
        console.print(f"      {escape(' '.join(row['prompt'].split())[:PROMPT_SHOWN])}")
    if not rows:
        console.print("Nothing waits.")


def withdraw(path: Path, items: list[str], *, reason: str, project: str | None) -> None:
    """One after the other; the first that can't be withdrawn ends it, and the ones before it are withdrawn."""

    async def body(api: Api) -> None:
        for item in items:
            where = f"/v1/projects/{api.project(project)}/queue/items/{in_path(item)}"
            found = await api.call("DELETE", where, reason=reason)
            why = f": {found['reason']}" if found["reason"] else ""
            print(f"{item} is withdrawn, by {found['by']} at {found['at'][:16].replace('T', ' ')} UTC{why}")

    with_api(path, body)


def _factor(row: dict[str, Any], name: str) -> str:
    """Not known is marked."""
    return f"{name} {row['factors'].get(name, 0):.2f}{'' if _known(row, name) else '?'}"


def _known(row: dict[str, Any], factor: str) -> bool:
    return factor == "traffic" or row[factor] is not None
