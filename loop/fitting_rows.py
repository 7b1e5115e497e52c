"""Rows that a trainer can take: the others are left out by name, and stop no night."""

from __future__ import annotations

from collections.abc import Sequence

from pydantic import ValidationError

from labeling.answers import calls_tools
from loop import preference_examples as preferences
from loop.trainers.preference_rows import Pair
from loop.trainers.spec import Row
from loop.training_examples import Row as AnyRow
from loop.vllm import Replica


def trainable(rows: list[AnyRow]) -> tuple[list[AnyRow], tuple[str, ...]]:
    """One conversation that the trainer can't take (pictures, tool calls) is left out and named: it stops no night."""
    kept, unfit = [], []
    for row in rows:
        if calls_tools(row["messages"][-1]["content"]):
            # As a text they would teach the model to write calls instead of making them.
            unfit.append(f"{row['id']} left out of training: its right answer calls tools, which no row can hold")
            continue
        try:
            Row.model_validate(row)
        except ValidationError as error:
            problem = error.errors()[0]
            unfit.append(f"{row['id']} left out of training: {'.'.join(map(str, problem['loc']))}: {problem['msg']}")
        else:
            kept.append(row)
    return kept, tuple(unfit)


async def short_enough(
    replica: Replica, base_name: str, rows: list[AnyRow], max_length: int
) -> tuple[list[AnyRow], tuple[str, ...]]:
    """Counts tokens with the engine's own template; a row that is too long is left out and named, never cut."""
    lengths = await replica.count_tokens(base_name, [row["messages"] for row in rows])
    kept = [row for row, length in zip(rows, lengths, strict=True) if length <= max_length]
    notes = tuple(
        f"{row['id']} left out: {length} tokens, more than max_length {max_length}"
        for row, length in zip(rows, lengths, strict=True)
        if length > max_length
    )
    return kept, notes


async def short_pairs(
    replica: Replica, base_name: str, pairs: Sequence[Pair], max_length: int
) -> tuple[list[Pair], tuple[str, ...]]:
    """The answer that is beaten must fit as well; the other one has been counted as a label."""
    rows = [preferences.rejected_row(pair) for pair in pairs]
    fit, notes = await short_enough(replica, base_name, rows, max_length) if rows else ([], ())
    short = {row["id"] for row in fit}
    return [pair for pair in pairs if pair.id in short], notes
