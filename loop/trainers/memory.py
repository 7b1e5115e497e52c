"""A run's memory: the plan it follows, kept beside its checkpoints, the limit it is held to, what it really takes."""

from __future__ import annotations

import ctypes
import gc
import resource
from collections.abc import Sequence
from typing import Any

import torch

from loop.machine_memory import Machine, host
from loop.memory_estimate import CUDA_CONTEXT, Workload
from loop.memory_plan import Plan
from loop.memory_record import NEAR_MISS, Attempt, MemoryOutcome, MemoryRecord, gib, read_record, write_record
from loop.model_shape import UnknownShape
from loop.run_plan import lowered, name_of, plans_of
from loop.trainers.planned_run import peak_memory_bytes
from loop.trainers.progress import resident_bytes
from loop.trainers.spec import TrainSpec
from loop.trainers.team import team

SLACK = 1.02  # free memory flutters between the preflight and the start of the trainer


class RunMemory:
    """Of one trainer process. `plan` is None where the base's shape is not known: then nothing is watched."""

    def __init__(self, spec: TrainSpec, backend: str, machine: Machine, batch: Workload, record: MemoryRecord) -> None:
        self._spec, self._backend, self._machine, self._batch = spec, backend, machine, batch
        self._record = record

    @property
    def plan(self) -> Plan:
        return self._record.plans[0]

    def settled(self, spec: TrainSpec) -> TrainSpec:
        """As this process follows it: no "auto" left."""
        memory = spec.memory.model_copy(
            update={"checkpointing": self.plan.checkpointing, "micro_tokens": self.plan.micro_tokens}
        )
        lengths = spec.lengths.model_copy(update={"at_once": self.plan.micro_tokens})
        return spec.model_copy(update={"memory": memory, "lengths": lengths})

    def limit(self) -> None:
        """A budget that was set is kept, whatever the plan thought: beyond it, an allocation fails."""
        if self._spec.memory.budget_gib is None:
            return
        if self._machine.device == "cuda":
            share = (self.plan.budget_bytes - CUDA_CONTEXT) / self._machine.total
            torch.cuda.set_per_process_memory_fraction(min(1.0, max(0.01, share)))
            return
        # The kernel counts what could be written to; what is reserved already and never touched is not held against it.
        room = max(0, self.plan.budget_bytes - resident_bytes())
        _, hard = resource.getrlimit(resource.RLIMIT_DATA)
        resource.setrlimit(resource.RLIMIT_DATA, (_status("VmData") + room, hard))

    def near_miss(self, measured: int) -> bool:
        return measured > NEAR_MISS * self.plan.budget_bytes

    def lower(self, measured: int) -> bool:
        """After a near miss, half as many tokens at once, written down; False where it can't be less."""
        less = lowered(self._spec, self._backend, self._machine, self._batch, self.plan)
        if less is None:
            return False
        given_up = Attempt(plan=self.plan, outcome="near_miss", measured_bytes=measured)
        rest = tuple(plan for plan in self._record.plans[1:] if plan.estimated_bytes < less.estimated_bytes)
        self._record = self._record.model_copy(
            update={"plans": (less, *rest), "attempts": (*self._record.attempts, given_up)}
        )
        if team().leads:
            write_record(self._spec.out_dir, self._record)
        return True

    def note(self, words: str) -> None:
        """For the run's result."""
        note = "; ".join(part for part in (self._record.note, words) if part)
        self._record = self._record.model_copy(update={"note": note})

    def room(self) -> int:
        """Bytes of the budget that the run has not needed so far."""
        return self.plan.budget_bytes - peak_bytes()

    def outcome(self, peak: int) -> MemoryOutcome:
        """`peak`: as `peak_memory_bytes`, the highest of all ranks and phases."""
        record = self._record
        return MemoryOutcome(
            plan=self.plan,
            machine=record.machine,
            measured_bytes=_with_context(peak),
            attempts=record.attempts,
            note=record.note,
        )


def settle(
    spec: TrainSpec, backend: str, batch: Workload, run_digest: str, compute_dtype: torch.dtype
) -> RunMemory | None:
    """The plan of an interrupted run again, else the preflight's, else one of our own. None: the base is of no known
    shape. `batch`: of the run's heaviest step."""
    machine = _machine(compute_dtype, spec)
    record = _record(spec, backend, machine, batch, run_digest) if team().leads else None
    told = team().words(record.model_dump_json() if record else "")
    return RunMemory(spec, backend, machine, batch, MemoryRecord.model_validate_json(told)) if told else None


def _record(spec: TrainSpec, backend: str, machine: Machine, batch: Workload, run_digest: str) -> MemoryRecord | None:
    kept = read_record(spec.out_dir, run_digest)
    if kept is not None and kept.machine == machine.name:
        return kept
    try:
        plans, note = _plans(spec, backend, machine, batch)
    except UnknownShape:
        return None
    attempts = kept.attempts if kept else ()
    record = MemoryRecord(run_digest=run_digest, machine=machine.name, plans=plans, attempts=attempts, note=note)
    write_record(spec.out_dir, record)
    return record


def _plans(spec: TrainSpec, backend: str, machine: Machine, batch: Workload) -> tuple[tuple[Plan, ...], str]:
    given = spec.memory.plans
    why = _unfit(given[0], machine, batch) if given else ""
    if given and not why:
        return given, ""
    return plans_of(spec, backend, machine, batch), f"planned anew: {why}" if why else ""


def _unfit(plan: Plan, machine: Machine, batch: Workload) -> str:
    """Why a plan made elsewhere does not hold here."""
    if plan.device != machine.device:
        return f"it was made for {plan.device}, and this is {machine.name}"
    if batch.least > plan.micro_tokens:
        what = "row has" if batch.together == 1 else "pair has"
        return f"the longest {what} {batch.least} tokens, more than the {plan.micro_tokens} that were planned for"
    if plan.budget_bytes > SLACK * machine.free:
        return f"only {gib(machine.free)} are free of the {gib(plan.budget_bytes)} that were"
    return ""


def _machine(compute_dtype: torch.dtype, spec: TrainSpec) -> Machine:
    """This rank's card; of what is free, what the fullest card has. Ranks on a CPU share the host's memory."""
    together, width = team(), compute_dtype.itemsize
    if not torch.cuda.is_available():
        here = host()
        share = (here.free + together.size * resident_bytes()) // together.size
        name = name_of(here.name, spec.cards)
        return Machine("cpu", name, here.total, int(together.least(share)), width)
    free, total = torch.cuda.mem_get_info()
    free = int(together.least(free + CUDA_CONTEXT))
    return Machine("cuda", name_of(torch.cuda.get_device_name(), spec.cards), total, free, width)


def peak_bytes() -> int:
    """Since the process began or `forget_peak`: allocated on a card, and its context; on a CPU what was resident."""
    return _with_context(peak_memory_bytes())


def _with_context(peak: int) -> int:
    return peak + (CUDA_CONTEXT if torch.cuda.is_available() else 0)


def forget_peak() -> None:
    """What can be given back is, and the next peak counts from here."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        return
    ctypes.CDLL(None).malloc_trim(0)
    with open("/proc/self/clear_refs", "w", encoding="ascii") as file:
        file.write("5")


def is_out_of_memory(error: BaseException) -> bool:
    text = str(error)
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or any(
        sign in text for sign in ("out of memory", "can't allocate memory", "Cannot allocate memory", "bad_alloc")
    )


def optimizer_bytes(parameters: Sequence[Any]) -> int:
    """Of AdamW's two moments, which the first step allocates."""
    return sum(2 * weight.numel() * weight.element_size() for weight in parameters)


def _status(key: str) -> int:
    with open("/proc/self/status", encoding="ascii") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith(f"{key}:"))
