"""From a training spec, its rows and a machine to memory plans. No torch: preflight stage and trainers call it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from loop.heaviest_step import RowSize, heaviest_step
from loop.machine_memory import Machine
from loop.memory_estimate import Checkpointing, Method, Setup, Workload
from loop.memory_plan import MODES, Plan, halves, ladder, plan_for, plans_by_speed
from loop.memory_record import gib
from loop.model_shape import UnknownShape, read_shape
from loop.trainers.axolotl_config import rows_at_once
from loop.trainers.preference_rows import preference_rows
from loop.trainers.spec import CardsSpec, Row, TrainSpec, with_sharding

EAGER_UP_TO_TOKENS = 128  # below, plain attention is a fifth faster on a CPU; above, it needs too much memory
TEMPLATE_TOKENS = 64  # of a template's own system prompt
ERROR = 1.15  # how far an estimate may be off: only beyond it is a training refused beforehand
MESSAGE_TOKENS = 16  # of the marks around each message


def workload(spec: TrainSpec, rows: Sequence[Row]) -> Workload:
    """Of the heaviest step, from the rows of train.jsonl and, for preferences, those beside it."""
    preferences = preference_rows(spec.data_dir) if spec.method != "sft" else []
    own, others = (row_sizes(some, spec.base_dir, spec.lengths.max_length) for some in (rows, preferences))
    return heaviest_step(spec, own, others)


def name_of(machine: str, cards: CardsSpec) -> str:
    """A plan for one way of sharing is none for another."""
    if not cards.launched:
        return machine
    return f"{cards.gpus} x {machine}{', sharded' if cards.sharded else ''}"


def row_sizes(rows: Sequence[Row], base_dir: Path, max_length: int) -> list[RowSize]:
    """Before the trainer has read them with the base's template: a little more than they will be.

    Without a tokenizer.json, a byte counts as a token, which is more than any tokenizer makes.
    """
    count = _counter(base_dir)
    sizes = []
    for row in rows:
        answer = count(row.messages[-1].content) + MESSAGE_TOKENS
        prompt = TEMPLATE_TOKENS + sum(count(message.content) + MESSAGE_TOKENS for message in row.messages[:-1])
        sizes.append(RowSize(min(answer + prompt, max_length), min(answer, max_length), row.kind == "replay"))
    return sizes


def setup_of(spec: TrainSpec, backend: str, machine: Machine, longest: int) -> Setup:
    """Raises UnknownShape where the base is none whose memory is known here."""
    return Setup(
        shape=read_shape(spec.base_dir),
        method=_method(spec),
        backend="unsloth" if backend == "unsloth" else "peft",
        rank=spec.lora.rank,
        targets=spec.lora.target_modules,
        optimizer=spec.schedule.optimizer,
        loss="model" if backend == "axolotl" else "chunked",
        compute_bytes=machine.compute_bytes,
        device=machine.device,
        gpus=spec.cards.gpus,
        sharded=spec.cards.sharded,
        eager_attention=backend == "peft" and machine.device == "cpu" and longest <= EAGER_UP_TO_TOKENS,
    )


def _method(spec: TrainSpec) -> Method:
    if spec.finetuning_type == "full":
        return "full"
    return "qlora" if spec.quantisation == "nf4" else "lora"


def plans_of(spec: TrainSpec, backend: str, machine: Machine, batch: Workload) -> tuple[Plan, ...]:
    """The ladder of this run on this machine, the fastest that fits first; the leanest alone where none fits."""
    setup = setup_of(spec, backend, machine, batch.length)
    wanted = spec.memory
    budget = machine.budget(wanted.budget_gib, wanted.share)
    if machine.device == "cuda" and spec.limits.memory_share is not None:
        budget = min(budget, int(spec.limits.memory_share * machine.total))
    modes: Sequence[Checkpointing] = MODES if wanted.checkpointing == "auto" else (wanted.checkpointing,)
    return ladder(plans_by_speed(setup, batch, budget, modes, _sizes(spec, backend, batch)))


def _sizes(spec: TrainSpec, backend: str, batch: Workload) -> list[int]:
    """Tokens at once, the most first: axolotl counts rows, and as many go at once in all of a step."""
    most = spec.memory.micro_tokens
    if backend != "axolotl":
        return halves(batch, most)
    sizes = [rows * batch.least for rows in rows_at_once(spec)]
    return [size for size in sizes if most is None or size <= most] or sizes[-1:]


def lowered(spec: TrainSpec, backend: str, machine: Machine, batch: Workload, plan: Plan) -> Plan | None:
    """The same with half as many tokens at once; None where it takes a single row or pair already."""
    if plan.micro_tokens <= batch.least:
        return None
    setup = setup_of(spec, backend, machine, batch.length)
    return plan_for(setup, batch, plan.checkpointing, batch.half(plan.micro_tokens), plan.budget_bytes)


def _counter(base_dir: Path) -> Callable[[str], int]:
    path = base_dir / "tokenizer.json"
    if not path.is_file():
        return lambda text: len(text.encode())
    tokenizer: Any = Tokenizer.from_file(str(path))
    return lambda text: len(tokenizer.encode(text, add_special_tokens=False).ids)


@dataclass(frozen=True)
class Planned:
    """The spec with its plans, what to tell people, and whether even the leanest plan asks for far too much."""

    spec: TrainSpec
    words: str
    fits: bool = True
    hopeless: bool = False


def planned(spec: TrainSpec, backend: str, rows: Sequence[Row], machine: Machine) -> Planned:
    """For the preflight: from what can be known beforehand. The trainer checks it, and plans anew if need be.

    `machine`: the fullest of the cards. Where it is left open, the base is shared out only if it must be.
    """
    if spec.cards.sharding != "auto" or not spec.cards.launched:
        return _planned(spec, backend, rows, machine)
    whole = _planned(with_sharding(spec, "replicate"), backend, rows, machine)
    if whole.fits or backend == "unsloth":
        return whole
    found = _planned(with_sharding(spec, "fsdp"), backend, rows, machine)
    words = f"{found.words}; the base is shared out among the cards"
    if spec.schedule.finish_share:
        words += ", so that finish_share is not used"
    return replace(found, words=words)


def _planned(spec: TrainSpec, backend: str, rows: Sequence[Row], machine: Machine) -> Planned:
    try:
        plans = plans_of(spec, backend, machine, workload(spec, rows))
    except UnknownShape as error:
        return Planned(spec, f"memory is not planned: {error}")
    first = plans[0]
    parts = f" in {first.micro_batches} parts" if first.micro_batches > 1 else ""
    words = (
        f"memory ({name_of(machine.name, spec.cards)}): checkpointing {first.checkpointing}, batches{parts} of at most "
        f"{first.micro_tokens:,} tokens at once, {gib(first.estimated_bytes)} of {gib(first.budget_bytes)}"
        f"{' on each card' if spec.cards.gpus > 1 else ''}"
    )
    spec = spec.model_copy(update={"memory": spec.memory.model_copy(update={"plans": plans})})
    hopeless = first.estimated_bytes > ERROR * first.budget_bytes / _share(spec)
    return Planned(spec, words, fits=first.fits, hopeless=hopeless)


def _share(spec: TrainSpec) -> float:
    return spec.memory.share if spec.memory.budget_gib is None else 1.0
