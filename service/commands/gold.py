"""`nightschool gold add | list | retire`: questions with a known answer, to see how well labellers label."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

from rich.console import Console
from rich.markup import escape
from rich.table import Column, Table

from labeling.errors import InvalidInput
from labeling.gold import InvalidGold, parse_gold
from labeling.labeling_screen import content_text
from service.commands.local_api import Api, in_path, with_api

QUESTIONS_PER_REQUEST = 200
MISTAKES_SHOWN = 20


class NoGoldFile(InvalidInput):
    code: ClassVar[str] = "no_gold_file"
    default_hint = InvalidGold.default_hint


def add(path: Path, file: Path, *, project: str | None) -> None:
    questions = read(file)

    async def body(api: Api) -> None:
        address = f"/v1/projects/{api.project(project)}/gold"
        added = known = 0
        for start in range(0, len(questions), QUESTIONS_PER_REQUEST):
            done = await api.call("POST", address, questions[start : start + QUESTIONS_PER_REQUEST])
            added, known = added + done["added"], known + done["known"]
        print(f"{added} gold questions added, {known} known already.")

    with_api(path, body)


def read(given: Path) -> list[Any]:
    """Every line of the file, or of the folder's .jsonl files; every mistake is named by file and line."""
    files = sorted(given.glob("*.jsonl")) if given.is_dir() else [given]
    mistakes: list[str] = []
    found = [question for file in files for question in _questions(file, mistakes)]
    if mistakes:
        more = f", and {len(mistakes) - MISTAKES_SHOWN} more" if len(mistakes) > MISTAKES_SHOWN else ""
        raise NoGoldFile(f"nothing was added: {'; '.join(mistakes[:MISTAKES_SHOWN])}{more}")
    if not found:
        raise NoGoldFile(f"{given} holds no gold question")
    return found


def _questions(file: Path, mistakes: list[str]) -> Iterator[Any]:
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise NoGoldFile(f"cannot read {file}: {error}") from None
    for number, line in enumerate(lines, start=1):
        if line.strip():
            try:
                question = json.loads(line)
                parse_gold([question])
                yield question
            except (ValueError, RecursionError) as error:
                mistakes.append(f"{file} line {number} is no JSON: {error}")
            except InvalidGold as error:
                mistakes.append(f"{file} line {number}: {', '.join(one['message'] for one in error.mistakes)}")


def show(path: Path, *, project: str | None, as_json: bool) -> None:
    async def body(api: Api) -> None:
        rows = await api.call("GET", f"/v1/projects/{api.project(project)}/gold")
        if as_json:
            print(json.dumps(rows, indent=1))
            return
        table = Table(Column("id", no_wrap=True), "question", "verdict", "asked", "right", "")
        for row in rows:
            question = content_text(row["messages"][-1].get("content"))
            right, retired = f"{row['right']} of {row['answers']}", "retired" if row["retired"] else ""
            table.add_row(*map(escape, (row["id"], question, row["verdict"], str(row["asked"]), right, retired)))
        Console().print(table if rows else "There are no gold questions: `nightschool gold add FILE`.")

    with_api(path, body)


def retire(path: Path, gold_id: str, *, project: str | None) -> None:
    async def body(api: Api) -> None:
        await api.call("DELETE", f"/v1/projects/{api.project(project)}/gold/{in_path(gold_id)}")
        print(f"{gold_id} is asked no more.")

    with_api(path, body)
