"""The heaviest step that a method can make of its rows, by their sizes: what memory is planned for. No torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import reduce

from loop.memory_estimate import Workload
from loop.methods import shows_answers
from loop.trainers.preference_rows import most_of_each
from loop.trainers.spec import TrainSpec


@dataclass(frozen=True)
class RowSize:
    """Tokens of a row, and how many of them are its answer."""

    tokens: int
    answer: int
    replay: bool


def heaviest_step(spec: TrainSpec, rows: Sequence[RowSize], preferences: Sequence[RowSize]) -> Workload:
    """On one card, over all phases of the method. `preferences`: both answers of each pair, or thumbs.

    Replay rows go through the model apart from pairs and thumbs, and what the base says of them is asked as they come.
    Of several cards each has an even share, pairs whole; one that gets more rows, as they are shorter, has no more of
    them at once than this.
    """
    cards = spec.cards.gpus
    replay = [size for size in rows if size.replay]
    found = []
    if shows_answers(spec.method, corrections=len(replay) < len(rows)):
        found.append(heaviest_batch(rows, _a_card(spec.schedule.batch_size, cards)))
    if spec.method != "sft":
        together = 1 if spec.method == "kto" else 2
        units, held = most_of_each(len(preferences) // together, len(replay), spec.schedule)
        at_most = heaviest_batch(preferences, together * _a_card(units, cards))
        found.append(replace(at_most, together=together, ahead=1))
        found += [replace(heaviest_batch(replay, _a_card(held, cards)), ahead=1)] if held else []
    return reduce(_worse, found)


def _a_card(number: int, cards: int) -> int:
    return -(-number // cards)


def heaviest_batch(sizes: Sequence[RowSize], batch_size: int) -> Workload:
    """The worst that a batch of these rows can be: the longest row, padded to by as many as there are places."""
    longest = max(size.tokens for size in sizes)
    answers = sorted((size.answer for size in sizes), reverse=True)[:batch_size]
    held = sorted((size.answer for size in sizes if size.replay), reverse=True)[:batch_size]
    rows = min(batch_size, len(sizes))
    usual = sum(size.tokens for size in sizes) / (len(sizes) * longest)
    return Workload(rows * longest, longest, sum(answers), sum(held), usual)


def _worse(one: Workload, other: Workload) -> Workload:
    """What holds both, whichever comes."""
    return Workload(
        tokens=max(one.tokens, other.tokens),
        length=max(one.length, other.length),
        scored=max(one.scored, other.scored),
        replay_scored=max(one.replay_scored, other.replay_scored),
        usual=min(one.usual, other.usual),
        together=max(one.together, other.together),
        ahead=max(one.ahead, other.ahead),
    )
