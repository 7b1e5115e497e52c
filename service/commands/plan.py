"""`nightschool plan`: what fits onto a card, how and how fast; needs neither a GPU nor torch nor an installation."""

from __future__ import annotations

import json
import re
from typing import Any, get_args

from rich.console import Console
from rich.table import Column, Table

from labeling.errors import InvalidInput
from loop.memory_estimate import ITEMS, Method, Optimizer
from loop.memory_record import gib
from loop.model_shape import find_shape
from loop.plan_advice import Answer, Question, answer

UNITS = {"": 2**30, "GIB": 2**30, "GB": 10**9, "MIB": 2**20, "MB": 10**6}
# model, method, cards: what is asked most.
USUAL: tuple[tuple[str, Method, int], ...] = (
    ("7B", "qlora", 1),
    ("7B", "lora", 1),
    ("8B", "qlora", 1),
    ("8B", "lora", 1),
    ("13B", "qlora", 1),
    ("13B", "lora", 1),
    ("32B", "qlora", 1),
    ("32B", "qlora", 2),
    ("7B", "full", 1),
    ("7B", "full", 4),
)
SEVERAL = 'Of several cards each trains its share of the rows; "shared": and holds its share of the base only.'
FULL = "full: the weights of all linear layers are trained, and an adapter is extracted from what changed."

WIDTH = 100


class BadPlan(InvalidInput):
    code = "bad_plan"


def run(
    *,
    model: list[str],
    gpu: str,
    gpus: int | None,
    length: int,
    batch: int,
    method: str | None,
    rank: int,
    backend: str,
    optimizer: str,
    as_json: bool,
) -> None:
    card = _bytes(gpu)
    if method is not None and method not in get_args(Method):
        raise BadPlan(f"there is no method {method!r}", hint=f"One of: {', '.join(get_args(Method))}.")
    known = next((one for one in get_args(Optimizer) if one == optimizer), None)
    if known is None:
        raise BadPlan(f"there is no optimizer {optimizer!r}", hint=f"One of: {', '.join(get_args(Optimizer))}.")
    answers = [
        answer(
            Question(
                shape=find_shape(name),
                method=way,
                card_bytes=card,
                gpus=cards,
                length=length,
                batch=batch,
                rank=rank,
                backend=backend,
                optimizer=known,
            )
        )
        for name, way, cards in _asked(model, method, gpus)
    ]
    if as_json:
        print(json.dumps([_as_json(found) for found in answers], indent=1))
        return
    _show(answers, gpu)


def _asked(models: list[str], method: Any, gpus: int | None) -> list[tuple[str, Method, int]]:
    if not models:
        return [
            (name, way, gpus or cards)
            for name, way, cards in USUAL
            if (method in {None, way}) and (gpus is None or gpus == cards or name == "7B")
        ]
    ways: tuple[Method, ...] = get_args(Method) if method is None else (method,)
    return [(name, way, gpus or 1) for name in models for way in ways]


def _bytes(text: str) -> int:
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", text)
    if found is None or found[2].upper() not in UNITS or float(found[1]) == 0:
        raise BadPlan(f"{text!r} is no size of a card", hint="Such as 24GiB.")
    return int(float(found[1]) * UNITS[found[2].upper()])


def _show(answers: list[Answer], gpu: str) -> None:
    console = Console(soft_wrap=True)
    console.width = max(console.width, WIDTH)
    console.print(_table(answers, gpu))
    for found in answers:
        if found.short:
            asked = found.question
            cards = f"{asked.gpus} card{'s' if asked.gpus > 1 else ''}"
            console.print(f"{asked.shape.name} {asked.method} on {cards} would fit with {', or '.join(found.cures)}")
    if len({(found.question.shape.name, found.question.gpus) for found in answers}) == 1:
        console.print(_items(answers))
    console.print("Tokens a second are of one H100, calibrated on an 8B model; elsewhere only their order counts.")
    if any(found.question.gpus > 1 for found in answers):
        console.print(SEVERAL)
    if any(found.question.method == "full" for found in answers):
        console.print(FULL)


def _table(answers: list[Answer], gpu: str) -> Table:
    number = [Column(name, justify="right") for name in ("cards", "at once", "needs", "tokens/s")]
    table = Table("model", "method", number[0], "checkpointing", *number[1:], f"of {gpu} a card")
    for found in answers:
        asked, plan = found.question, found.plan
        at_once = f"{plan.micro_tokens // asked.length} x {asked.length}"
        table.add_row(
            asked.shape.name,
            asked.method,
            f"{asked.gpus} shared" if asked.setup.sharded else str(asked.gpus),
            plan.checkpointing,
            f"{at_once}, {plan.micro_batches} times" if plan.micro_batches > 1 else at_once,
            gib(plan.estimated_bytes),
            f"{plan.tokens_per_s:,.0f}" if asked.gpus == 1 else "–",
            "fits" if not found.short else f"short by {gib(found.short)}",
        )
    return table


def _items(answers: list[Answer]) -> Table:
    table = Table("GiB", *[Column(found.question.method, justify="right") for found in answers])
    for item in ITEMS:
        table.add_row(item.replace("_", " "), *[f"{getattr(found.items, item) / 2**30:.2f}" for found in answers])
    table.add_row("at the peak, in", *[found.items.moment for found in answers])
    return table


def _as_json(found: Answer) -> dict[str, Any]:
    asked = found.question
    return {
        "model": asked.shape.name,
        "method": asked.method,
        "gpus": asked.gpus,
        "sharded": asked.setup.sharded,
        "length": asked.length,
        "batch": asked.batch,
        "fits": not found.short,
        "short_bytes": found.short,
        "would_fit": list(found.cures),
        "moment": found.items.moment,
        "items": {item: getattr(found.items, item) for item in ITEMS},
        **found.plan.model_dump(),
    }
