"""Rows as tokens, and which of them are trained in which step. No torch: the tokenizer is handed in."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from labeling.errors import InvalidInput
from loop.trainers.spec import BadRows, Row, ScheduleSpec

BATCHES_PER_BUCKET = 8  # rows are sorted by length among this many batches: little padding, still well mixed


class UnfitTemplate(InvalidInput):
    code = "unfit_template"
    default_hint = "Train on a base whose chat template continues the prompt with the answer, unchanged."


@dataclass(frozen=True)
class Example:
    """`tokens[answer_start:]` are the answer and the end-of-turn token: the part that the loss is on."""

    id: str
    tokens: tuple[int, ...]
    answer_start: int
    replay: bool


def tokenise(rows: Sequence[Row], tokenizer: Any, stop_ids: frozenset[int], max_length: int) -> list[Example]:
    """Rows through the model's own template. Nothing is ever cut: rows that are too long are refused, all at once."""
    if not tokenizer.chat_template:
        raise UnfitTemplate("the base's tokenizer has no chat template")
    examples = [_example(row, tokenizer, stop_ids) for row in rows]
    long = [example for example in examples if len(example.tokens) > max_length]
    if long:
        named = ", ".join(f"{example.id} ({len(example.tokens)})" for example in long[:10])
        raise BadRows(
            f"{len(long)} of {len(examples)} rows are longer than max_length = {max_length} tokens: {named}",
            hint="Raise trainer.max_length or shorten these labels; rows are never cut silently.",
        )
    return examples


def _example(row: Row, tokenizer: Any, stop_ids: frozenset[int]) -> Example:
    messages = [message.model_dump() for message in row.messages]
    prompt = _render(tokenizer, messages[:-1], add_generation_prompt=True)
    whole = _render(tokenizer, messages, add_generation_prompt=False)
    if whole[: len(prompt)] != prompt or len(whole) == len(prompt):
        raise UnfitTemplate(
            f"row {row.id}: with the base's chat template, the prompt is not the beginning of prompt and answer"
        )
    return Example(row.id, tuple(_to_end_of_turn(whole, len(prompt), stop_ids)), len(prompt), row.kind == "replay")


def _render(tokenizer: Any, messages: list[dict[str, str]], *, add_generation_prompt: bool) -> list[int]:
    rendered = tokenizer.apply_chat_template(
        messages, add_generation_prompt=add_generation_prompt, tokenize=True, return_dict=True
    )
    return list(rendered["input_ids"])


def _to_end_of_turn(tokens: list[int], answer_start: int, stop_ids: frozenset[int]) -> list[int]:
    """What a template writes after the end-of-turn token (a newline, mostly) is never generated: not trained either."""
    for position in range(len(tokens) - 1, answer_start, -1):
        if tokens[position] in stop_ids:
            return tokens[: position + 1]
    raise UnfitTemplate("the base's chat template ends no answer with one of the base's stop tokens")


def plan_batches(lengths: Sequence[int], schedule: ScheduleSpec, seed: int) -> list[list[int]]:
    """Row numbers for every step of the run, settled beforehand: a resumed run continues the same plan.

    Every epoch is shuffled anew; rows of like length share a batch.
    """
    steps = math.ceil(schedule.epochs * math.ceil(len(lengths) / schedule.batch_size))
    steps = steps if schedule.max_steps is None else min(steps, schedule.max_steps)
    plan: list[list[int]] = []
    epoch = 0
    while len(plan) < steps:
        plan += _epoch(lengths, schedule.batch_size, random.Random(f"{seed} {epoch}"))  # noqa: S311 - order, no secret
        epoch += 1
    return plan[:steps]


def _epoch(lengths: Sequence[int], batch_size: int, chance: random.Random) -> list[list[int]]:
    order = list(range(len(lengths)))
    chance.shuffle(order)
    bucket = batch_size * BATCHES_PER_BUCKET
    order = [
        row for start in range(0, len(order), bucket) for row in _by_length(order[start : start + bucket], lengths)
    ]
    batches = [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
    chance.shuffle(batches)
    return batches


def _by_length(rows: list[int], lengths: Sequence[int]) -> list[int]:
    return sorted(rows, key=lambda row: lengths[row])


def heaviest(plan: Sequence[list[int]], lengths: Sequence[int]) -> list[int]:
    """The batch that needs most memory: most tokens once padded to its longest row."""
    return max(plan, key=lambda batch: len(batch) * max(lengths[row] for row in batch))
