"""Does a training fit onto a card, how, how fast, and if not, what would? For `nightschool plan`. No torch."""

from __future__ import annotations

from dataclasses import dataclass, replace

from loop.memory_estimate import GIB, Estimate, Method, Optimizer, Setup, Workload
from loop.memory_plan import Plan, itemised, ladder, plans_by_speed
from loop.model_shape import ALL_LAYERS, ModelShape

CARDS = (1, 2, 4, 8)
SHORTEST = 256
LEANER: dict[Method, tuple[Method, ...]] = {"full": ("lora", "qlora"), "lora": ("qlora",), "qlora": ()}


@dataclass(frozen=True)
class Question:
    """`card_bytes` of each card; `share` of them is for training. `batch` rows of `length` tokens make a step.

    Of several cards each trains its share of the rows; `sharded`: and holds its share of the base.
    """

    shape: ModelShape
    method: Method
    card_bytes: int
    gpus: int = 1
    sharded: bool = False
    length: int = 4096
    batch: int = 8
    rank: int = 16
    backend: str = "unsloth"
    optimizer: Optimizer = "adamw"
    share: float = 0.9

    @property
    def setup(self) -> Setup:
        return Setup(
            shape=self.shape,
            method=self.method,
            backend="peft" if self.method == "full" or self.sharded or self.backend == "peft" else "unsloth",
            rank=self.rank,
            targets=tuple(name for name in ALL_LAYERS if name in self.shape.sides()),
            optimizer=self.optimizer,
            gpus=self.gpus,
            sharded=self.sharded or (self.method == "full" and self.gpus > 1),
        )

    @property
    def work(self) -> Workload:
        """Of one card, every token under the loss: the worst."""
        tokens = -(-self.batch // self.gpus) * self.length
        return Workload(tokens=tokens, length=self.length, scored=tokens)


@dataclass(frozen=True)
class Answer:
    """The fastest plan that fits, or the leanest; `short` bytes are missing then, and `cures` would do."""

    question: Question
    plan: Plan
    items: Estimate
    short: int
    cures: tuple[str, ...]


def answer(question: Question) -> Answer:
    """Shared out among the cards only where the base does not fit whole on each."""
    if question.gpus > 1 and not question.sharded and not _best(question).fits:
        question = replace(question, sharded=True)
    plan = _best(question)
    short = max(0, plan.estimated_bytes - plan.budget_bytes)
    items = itemised(question.setup, question.work, plan)
    return Answer(question, plan, items, short, _cures(question, plan) if short else ())


def _best(question: Question) -> Plan:
    budget = int(question.share * question.card_bytes)
    return ladder(plans_by_speed(question.setup, question.work, budget))[0]


def _cures(question: Question, plan: Plan) -> tuple[str, ...]:
    """Each alone is enough."""
    cures = [f"--method {method}" for method in LEANER[question.method] if _fits(replace(question, method=method))][:1]
    if question.optimizer == "adamw" and _fits(replace(question, optimizer="adamw_8bit")):
        cures.append("--optimizer adamw_8bit")
    length = question.length // 2
    while length >= SHORTEST and not _fits(replace(question, length=length)):
        length //= 2
    if length >= SHORTEST:
        cures.append(f"--length {length}")
    more = (count for count in CARDS if count > question.gpus and _fits(replace(question, gpus=count)))
    if (count := next(more, 0)) != 0:
        cures.append(f"--gpus {count}")
    return (*cures, f"--gpu {-(-plan.estimated_bytes // int(question.share * GIB))}GiB")


def _fits(question: Question) -> bool:
    ways = (False, True) if question.gpus > 1 else (question.sharded,)
    return any(_best(replace(question, sharded=sharded)).fits for sharded in ways)
