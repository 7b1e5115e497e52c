"""Which settings would make a training fit into memory, where it does not as it is. No torch; the preflight asks."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from loop.machine_memory import Machine
from loop.memory_record import gib
from loop.run_plan import plans_of, workload
from loop.trainers.spec import Row, TrainSpec


def cures(spec: TrainSpec, backend: str, rows: Sequence[Row], machine: Machine) -> tuple[str, ...]:
    """Each alone is enough, by the estimate; the memory that it would take as it is comes last."""
    batch = workload(spec, rows)
    would = [words for words, leaner in _leaner(spec) if plans_of(leaner, backend, machine, batch)[-1].fits]
    needed = plans_of(spec, backend, machine, batch)[-1].estimated_bytes
    return (*would, f"{gib(needed)} for the training")


def _leaner(spec: TrainSpec) -> Iterator[tuple[str, TrainSpec]]:
    """In the words of the settings. Length is no cure: a row that is longer than max_length is refused, not cut."""
    lora = spec.model_copy(update={"finetuning_type": "lora"})
    if spec.finetuning_type == "full":
        yield 'finetuning_type = "lora"', lora
    if spec.quantisation == "none":
        also = 'finetuning_type = "lora" and ' if spec.finetuning_type == "full" else ""
        yield f'{also}quantisation = "nf4"', lora.model_copy(update={"quantisation": "nf4"})
    if spec.schedule.optimizer == "adamw":
        schedule = spec.schedule.model_copy(update={"optimizer": "adamw_8bit"})
        yield 'optimizer = "adamw_8bit"', spec.model_copy(update={"schedule": schedule})
    if spec.memory.checkpointing == "off":
        memory = spec.memory.model_copy(update={"checkpointing": "auto"})
        yield 'checkpointing = "auto"', spec.model_copy(update={"memory": memory})
