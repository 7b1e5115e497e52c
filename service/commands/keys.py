"""`nightschool keys create | list | revoke`."""

from __future__ import annotations

import json
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Column, Table

from service.commands.local_api import Api, in_path, with_api


def create(path: Path, name: str, *, scopes: str, project: str | None, as_json: bool) -> None:
    async def body(api: Api) -> None:
        wanted = [scope.strip() for scope in scopes.split(",") if scope.strip()]
        made = await api.call("POST", "/v1/keys", {"name": name, "scopes": wanted, "project": project})
        print(json.dumps(made) if as_json else made["key"])

    with_api(path, body)


def show(path: Path, *, as_json: bool) -> None:
    async def body(api: Api) -> None:
        rows = await api.call("GET", "/v1/keys")
        if as_json:
            print(json.dumps(rows, indent=1))
            return
        table = Table(Column("id", no_wrap=True), "name", "scopes", "project", "created", "revoked")
        for row in rows:
            scopes = ", ".join(row["scopes"])
            cells = (
                row["id"],
                row["name"],
                scopes,
                row["project"] or "all",
                row["created_at"],
                row["revoked_at"] or "",
            )
            table.add_row(*map(escape, cells))
        Console().print(table)

    with_api(path, body)


def revoke(path: Path, key_id: str) -> None:
    async def body(api: Api) -> None:
        await api.call("DELETE", f"/v1/keys/{in_path(key_id)}")
        print(f"{key_id} is revoked.")

    with_api(path, body)
