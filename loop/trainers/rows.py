"""Rows as tokens, and which of them are trained in which step. No torch: the tokenizer is handed in."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from labeling.errors import InvalidInput
from loop.trainers.spec import BadRows, Row, ScheduleSpec

BATCHES_PER_BUCKET = 8  # rows are sorted by length among this many batches: little padding, still well mixed


class UnfitTemplate(InvalidInput):
    code = "unfit_template"
    default_hint = "Train on a base whose chat template continues the prompt with the answer, unchanged."


@dataclass(frozen=True)
class Example:
    """`tokens[answer_start:]` are the answer and the end-of-turn token: the part that the loss is on.

    Tokens are a tuple, or an array of int32 that is mapped from a file.
    """

    id: str
    tokens: Sequence[int]
    answer_start: int
    replay: bool


def tokenise(rows: Sequence[Row], tokenizer: Any, stop_ids: frozenset[int], max_length: int) -> Iterator[Example]:
    """Rows through the model's own template. Nothing is ever cut: rows that are too long are refused, all at once, when
    the last one has been seen."""
    if not tokenizer.chat_template:
        raise UnfitTemplate("the base's tokenizer has no chat template")
    long: list[str] = []
    for row in rows:
        example = _example(row, tokenizer, stop_ids)
        if len(example.tokens) > max_length:
            long.append(f"{example.id} ({len(example.tokens)})")
        yield example
    if long:
        raise BadRows(
            f"{len(long)} of {len(rows)} rows are longer than max_length = {max_length} tokens: {', '.join(long[:10])}",
            hint="Raise trainer.max_length or shorten these labels; rows are never cut silently.",
        )


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


class Draws(Protocol):
    """What of a recipe settles how many rows are trained."""

    @property
    def epochs(self) -> float: ...
    @property
    def min_steps(self) -> int: ...
    @property
    def batch_size(self) -> int: ...
    @property
    def replay_share(self) -> float: ...


def rows_drawn(recipe: Draws, labels: int, *, replay: bool = True) -> tuple[int, int]:
    """How many label rows and replay rows a run draws, each row as often as it comes."""
    share = recipe.replay_share if replay else 0.0
    least = int((recipe.min_steps - 1) * recipe.batch_size * (1 - share)) + 1
    of_labels = max(round(recipe.epochs * labels), least)
    return of_labels, round(of_labels * share / (1 - share))


def plan_batches(
    lengths: Sequence[int], schedule: ScheduleSpec, seed: int, replay: Sequence[bool] | None = None
) -> list[list[int]]:
    """Row numbers for every step of the run, settled beforehand: a resumed run continues the same plan.

    `epochs` counts passes over the labels; there are more where these would make fewer than `min_steps` steps. Replay
    rows fill `replay_share` of every batch, each coming as often as any other: a hundred labels need the base held on
    hundreds of different prompts, not on a few again and again.
    """
    replay = replay or [False] * len(lengths)
    chance = random.Random(str(seed))  # noqa: S311 - order, no secret
    labels, held = ([row for row, is_replay in enumerate(replay) if is_replay is kind] for kind in (False, True))
    if not labels:
        labels, held = held, labels
    of_labels, of_held = rows_drawn(schedule, len(labels), replay=bool(held))
    order = _evenly(_passes(labels, of_labels, chance), _passes(held, of_held, chance))
    bucket = schedule.batch_size * BATCHES_PER_BUCKET
    plan: list[list[int]] = []
    for start in range(0, len(order), bucket):
        rows = _by_length(order[start : start + bucket], lengths, replay)
        batches = [rows[first : first + schedule.batch_size] for first in range(0, len(rows), schedule.batch_size)]
        chance.shuffle(batches)
        plan += batches
    return plan[: schedule.max_steps]


def plan_examples(examples: Sequence[Example], schedule: ScheduleSpec, seed: int) -> tuple[list[list[int]], list[int]]:
    """Supervised fine-tuning's plan; and of every step the tokens, padding not counted."""
    lengths = [len(example.tokens) for example in examples]
    plan = plan_batches(lengths, schedule, seed, [example.replay for example in examples])
    return plan, [sum(lengths[row] for row in step) for step in plan]


def _passes(rows: list[int], wanted: int, chance: random.Random) -> list[int]:
    """Every pass is shuffled anew; the last one may be a part."""
    order: list[int] = []
    while rows and len(order) < wanted:
        order += chance.sample(rows, len(rows))
    return order[:wanted]


def _evenly(labels: list[int], held: list[int]) -> list[int]:
    placed = [((place + 0.5) / len(rows), row) for rows in (labels, held) for place, row in enumerate(rows)]
    return [row for _, row in sorted(placed)]


def _by_length(rows: list[int], lengths: Sequence[int], replay: Sequence[bool]) -> list[int]:
    """Rows of like length next to each other, while each place keeps its kind: every batch has its share of replay."""
    short_first = {
        kind: iter(sorted((row for row in rows if replay[row] is kind), key=lambda row: lengths[row]))
        for kind in (False, True)
    }
    return [next(short_first[replay[row]]) for row in rows]


def parts_of(
    rows: Sequence[int], lengths: Sequence[int], at_once: int | None, *, packed: bool = False
) -> list[list[int]]:
    """A step's rows in parts of at most `at_once` tokens, padding included; a longer row is a part of its own."""
    parts: list[list[int]] = []
    for row in rows:
        wider = [*parts[-1], row] if parts else [row]
        if parts and (at_once is None or weight(wider, lengths, packed=packed) <= at_once):
            parts[-1] = wider
        else:
            parts.append([row])
    return parts


def weight(rows: Sequence[int], lengths: Sequence[int], *, packed: bool = False) -> int:
    """Tokens that go through the model: padded to the longest row, or packed end to end."""
    return sum(lengths[row] for row in rows) if packed else len(rows) * max(lengths[row] for row in rows)


def heaviest(
    plan: Sequence[list[int]], lengths: Sequence[int], at_once: int | None = None, *, packed: bool = False
) -> list[int]:
    """The part of a step that needs most memory."""
    parts = (part for step in plan for part in parts_of(step, lengths, at_once, packed=packed))
    return max(parts, key=lambda part: weight(part, lengths, packed=packed))
