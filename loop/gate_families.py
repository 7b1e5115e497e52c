"""What the gate looks at: families of paired scores, and each one's line of numbers. Rules stand in `loop.gate`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from loop import gate_statistics as statistics
from loop.settings import GateSettings

FLAGGED = ("trained", "held_out")
EARLIER = "earlier_fixes"  # what the current model was taught: it must not be lost for what is new
POOL = "pool"
TASK = "task:"
AGAINST_BASE = " against base"
MODELS = ("base", "current", "candidate")


@dataclass(frozen=True)
class PairedItem:
    """One item's scores, 0..1, of the three models."""

    id: str
    base: float
    current: float
    candidate: float


@dataclass(frozen=True)
class Family:
    """All items of one family; `silent` names the models that gave nothing but empty answers."""

    name: str
    items: tuple[PairedItem, ...]
    silent: tuple[str, ...] = ()

    @property
    def n(self) -> int:
        return len(self.items)

    @property
    def lost(self) -> int:
        return sum(item.candidate < item.current for item in self.items)

    @property
    def won(self) -> int:
        return sum(item.candidate > item.current for item in self.items)

    @property
    def losses(self) -> list[float]:
        return [item.current - item.candidate for item in self.items]

    @property
    def graded(self) -> bool:
        return any(score not in {0.0, 1.0} for item in self.items for score in (item.current, item.candidate))

    def mean(self, model: str) -> float:
        return sum(getattr(item, model) for item in self.items) / self.n if self.n else math.nan


@dataclass(frozen=True)
class FamilyVerdict:
    """One line of the report's table. p-values are one-sided; `loss_bound` is the upper bound, a fraction."""

    name: str
    n: int
    base: float
    current: float
    candidate: float
    lost: int
    won: int
    p_loss: float
    p_loss_holm: float
    p_gain: float
    loss_bound: float
    bound_by: str  # gain: it gained | own: this line's bound must be below the margin | pool: the pool's must
    needed: int | None = None  # about how many more items decide it, where its bound leaves that open


def examine(families: Sequence[Family], settings: GateSettings) -> list[FamilyVerdict]:
    """A line a family, and one of the pool that small ones lean on (docs/decisions/0002-gate-pooling.md says why)."""
    lines = [_line(family, settings) for family in families]
    pooled = _pooled(families, lines, settings)
    lines += [_line(family, settings) for family in _against_base(families)]
    if len(pooled) == 1:
        lines = [replace(line, bound_by="own") if line.name == pooled[0].name else line for line in lines]
    elif pooled:
        lines.append(replace(_line(_pool(pooled), settings), bound_by="own"))
    adjusted = statistics.holm([line.p_loss for line in lines])
    tests = len(lines)
    return [
        _with_needed(replace(line, p_loss_holm=p), settings, tests) for line, p in zip(lines, adjusted, strict=True)
    ]


def _against_base(families: Sequence[Family]) -> list[Family]:
    """Tasks once more, with the base in the place of current: night by night almost the margin would add up."""
    return [
        Family(f"{family.name}{AGAINST_BASE}", tuple(replace(item, current=item.base) for item in family.items))
        for family in families
        if family.name.startswith(TASK) and any(item.base != item.current for item in family.items)
    ]


def _pooled(families: Sequence[Family], lines: Sequence[FamilyVerdict], settings: GateSettings) -> list[Family]:
    """The families too small to be bounded alone; where they are too few even together, the large ones beside them.

    Large ones stay out otherwise: many items of theirs, right or wrong by luck, would hide what a small one lost.
    """
    kept = [(family, line) for family, line in zip(families, lines, strict=True) if line.bound_by != "gain"]
    small = [family for family, line in kept if line.bound_by == "pool"]
    if not small or sum(family.n for family in small) >= _standalone(settings):
        return small
    return [family for family, _ in kept]


def _standalone(settings: GateSettings) -> int:
    return statistics.standalone_items(settings.margin_points / 100, settings.alpha)


def lost_beyond_margin(line: FamilyVerdict, settings: GateSettings) -> bool:
    """A small family whose seen loss is the margin or more: no pool may excuse it."""
    return line.bound_by == "pool" and line.current - line.candidate >= settings.margin_points / 100


def is_open(line: FamilyVerdict, settings: GateSettings) -> bool:
    """Its loss can't be said to be below the margin."""
    if line.bound_by == "pool":
        return lost_beyond_margin(line, settings)
    return line.bound_by == "own" and not line.loss_bound < settings.margin_points / 100


def _pool(families: Sequence[Family]) -> Family:
    return Family(
        POOL, tuple(replace(item, id=f"{family.name}/{item.id}") for family in families for item in family.items)
    )


def _line(family: Family, settings: GateSettings) -> FamilyVerdict:
    p_loss, p_gain, bound = _tests(family, settings.alpha)
    own = family.n >= _standalone(settings)
    return FamilyVerdict(
        name=family.name,
        n=family.n,
        base=family.mean("base"),
        current=family.mean("current"),
        candidate=family.mean("candidate"),
        lost=family.lost,
        won=family.won,
        p_loss=p_loss,
        p_loss_holm=p_loss,
        p_gain=p_gain,
        loss_bound=bound,
        bound_by="gain" if p_gain <= settings.alpha else "own" if own else "pool",
    )


def _tests(family: Family, alpha: float) -> tuple[float, float, float]:
    """p of a loss, p of a gain, upper bound of the loss."""
    if not family.graded:
        lost, won = family.lost, family.won
        bound = statistics.loss_upper_bound(lost, won, family.n, alpha)
        return statistics.mcnemar_loss(lost, won), statistics.mcnemar_gain(lost, won), bound
    losses = family.losses
    bound = statistics.graded_loss_upper_bound(losses, alpha)
    return statistics.permutation_loss(losses), statistics.permutation_loss([-x for x in losses]), bound


def _with_needed(line: FamilyVerdict, settings: GateSettings, tests: int) -> FamilyVerdict:
    """`tests`: of a loss, whose number Holm's method weighs against the smallest p."""
    if not is_open(line, settings):
        return line
    margin = settings.margin_points / 100
    needed = statistics.items_that_decide(line.lost, line.won, line.n, margin, settings.alpha, tests)
    return replace(line, needed=needed)
