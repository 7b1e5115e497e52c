"""A step's rows dealt out to the ranks that train it together. No torch: every rank works out all of it by itself."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

from loop.trainers.rows import parts_of
from loop.trainers.team import Team

T = TypeVar("T")


def shares(rows: Sequence[int], lengths: Sequence[int], ranks: int, has: Sequence[int] = ()) -> list[list[int]]:
    """Each rank's rows, in the step's order; their tokens as even as dealing the longest first makes them.

    `has`: tokens that each rank has in this step already. A step of fewer rows than ranks leaves some with none.
    """
    if ranks == 1:
        return [list(rows)]
    dealt: list[list[int]] = [[] for _ in range(ranks)]
    tokens = list(has) or [0] * ranks
    for place in sorted(range(len(rows)), key=lambda place: (-lengths[rows[place]], place)):
        rank = min(range(ranks), key=lambda rank: (tokens[rank], rank))
        dealt[rank].append(place)
        tokens[rank] += lengths[rows[place]]
    return [[rows[place] for place in sorted(places)] for places in dealt]


def most_parts(
    dealt: Sequence[Sequence[int]], lengths: Sequence[int], at_once: int | None, *, packed: bool = False
) -> int:
    """Of the rank that has most: where ranks hold the base together, all must pass through it as often."""
    return max(len(parts_of(rows, lengths, at_once, packed=packed)) for rows in dealt)


def in_step(made: list[T], most: Callable[[], int], team: Team, idle: Callable[[], T]) -> list[T]:
    """A rank's parts; where ranks hold the base together, with idle ones up to the `most` that any of them has."""
    if not team.sharded:
        return made
    return [*made, *(idle() for _ in range(most() - len(made)))]
