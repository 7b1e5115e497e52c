"""`python -m loop.trainers.axolotl SPEC`: the spec's recipe trained by axolotl, in an environment of its own.

Rows are tokenised as everywhere here and given to axolotl in the order of our plan; the adapter that comes out is
written as everywhere. `loop.backends` says what this backend can't do.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from labeling.errors import InvalidInput, NightschoolError
from loop.digests import write_durably, write_jsonl
from loop.memory_estimate import Workload
from loop.trainers.axolotl_config import CONFIG, DATA, OUT, render, rows_at_once
from loop.trainers.checkpoints import forget_incomplete, last_complete
from loop.trainers.child import live, load_tokenizer, planned_memory, stop_ids, unfinished, versions
from loop.trainers.launch_config import ZERO3, zero3_config
from loop.trainers.pace import Pace
from loop.trainers.preference_rows import Unit, kto_weights, plan_units
from loop.trainers.progress import Channel
from loop.trainers.rows import Example, UnfitTemplate, plan_examples, tokenise
from loop.trainers.spec import TrainResult, TrainSpec, read_rows
from loop.trainers.team import join, team

if TYPE_CHECKING:
    from loop.trainers.memory import RunMemory

IGNORED = -100  # as a label: no loss on this token


class NoAxolotl(NightschoolError):
    code = "no_axolotl"
    default_hint = "Set trainer.python to the Python of deploy/environments/axolotl (`make axolotl`)."


class NotByAxolotl(InvalidInput):
    code = "not_by_axolotl"
    default_hint = 'Set trainer.backend = "peft".'


def run(spec: TrainSpec, _: Path, channel: Channel) -> None:
    """Nothing to do where the same run has finished in this folder."""
    if spec.finetuning_type == "full":
        raise NotByAxolotl("axolotl does no full fine-tune that an adapter could carry")
    digest = unfinished(spec)
    if digest is None:
        return
    _start()
    join(channel.seat, sharded=spec.cards.sharded)
    import torch

    if spec.threads is not None:
        torch.set_num_threads(spec.threads)
    tokenizer = load_tokenizer(spec)
    folder = _folder(spec, digest)
    folder.mkdir(parents=True, exist_ok=True)
    data = _data(spec, tokenizer)
    spec, memory = planned_memory(spec, "axolotl", data.heaviest, digest)
    job = Job(spec, digest, folder, data, Pace(spec.schedule, len(data.tokens), spec.limits.seconds), memory)
    if team().leads:
        _prepare(job, on_gpu=torch.cuda.is_available())
    team().wait()
    since = time.monotonic()
    trainer, peak = _train(job, channel)
    if not team().leads:
        return
    _write_result(job, trainer, time.monotonic() - since, peak)
    shutil.rmtree(folder / OUT, ignore_errors=True)


def _folder(spec: TrainSpec, digest: str) -> Path:
    """Checkpoints of another run lie elsewhere; so do those of other ranks, each of which wrote its part."""
    ranks = f"-{spec.cards.gpus}-{spec.cards.sharding}" if spec.cards.launched else ""
    return spec.out_dir / f"axolotl-{digest.rpartition(':')[2][:16]}{ranks}"


def _start() -> None:
    os.environ.setdefault("CUDA_VISIBLE_DEVICES", "0")  # one GPU, as the other backends
    os.environ |= {"AXOLOTL_DO_NOT_TRACK": "1", "DO_NOT_TRACK": "1", "WANDB_DISABLED": "true"}
    try:
        import axolotl  # noqa: F401
    except ModuleNotFoundError as error:
        raise NoAxolotl(f"this environment lacks {error.name}, which the axolotl backend needs") from None


@dataclass(frozen=True)
class Data:
    """`rows` as axolotl reads them, `tokens` of every step, `examples` that there are, `weights` of thumbs."""

    rows: list[dict[str, Any]]
    tokens: list[int]
    examples: int
    heaviest: Workload
    weights: tuple[float, float] = (1.0, 1.0)


@dataclass(frozen=True)
class Job:
    """`spec` as the memory plan has settled it; `folder`: where this run's files lie until it has finished."""

    spec: TrainSpec
    digest: str
    folder: Path
    data: Data
    pace: Pace
    memory: RunMemory | None


def _data(spec: TrainSpec, tokenizer: Any) -> Data:
    from loop.trainers.phases import Data as Tokenised
    from loop.trainers.phases import preference_units

    stops, longest = stop_ids(spec.base_dir, tokenizer), spec.lengths.max_length
    if spec.method == "sft":
        examples = list(tokenise(read_rows(spec.data_dir), tokenizer, stops, longest))
        plan, _ = plan_examples(examples, spec.schedule, spec.seed)
        order = [row for batch in plan for row in batch]
        size = spec.schedule.batch_size
        steps = [order[start : start + size] for start in range(0, len(order), size)]
        tokens = [sum(len(examples[row].tokens) for row in step) for step in steps]
        return Data([_tokenised(examples[n]) for n in order], tokens, len(examples), Tokenised(examples).heaviest(spec))
    if spec.method not in ("dpo", "kto") or spec.start is not None:
        raise NotByAxolotl(f"axolotl does not train {spec.method!r} here, nor on top of an adapter")
    units = preference_units(spec, tokenizer, stops)
    plan_of_units = plan_units(units, [], spec.schedule, spec.seed)
    weights = kto_weights(units) if spec.method == "kto" else (1.0, 1.0)
    tokens = [sum(units[n].tokens for n in step) for step, _ in plan_of_units]
    heaviest = Tokenised((), units).heaviest(spec)
    return Data([_texts(unit, tokenizer) for unit in units], tokens, len(units), heaviest, weights)


def _tokenised(example: Example) -> dict[str, list[int]]:
    answer = list(example.tokens[example.answer_start :])
    return {
        "input_ids": list(example.tokens),
        "attention_mask": [1] * len(example.tokens),
        "labels": [IGNORED] * example.answer_start + answer,
    }


def _texts(unit: Unit, tokenizer: Any) -> dict[str, Any]:
    """trl tokenises these again: where its tokens would be others than ours, the run is refused."""
    first = unit.rows[0]
    prompt = tokenizer.decode(first.tokens[: first.answer_start])
    answers = [tokenizer.decode(row.tokens[row.answer_start :]) for row in unit.rows]
    for row, answer in zip(unit.rows, answers, strict=True):
        if tuple(tokenizer(prompt + answer)["input_ids"]) != row.tokens:
            raise UnfitTemplate(f"row {row.id}: as a text, its tokens are others than through the chat template")
    if unit.good is None:
        return {"prompt": prompt, "chosen": answers[0], "rejected": answers[1]}
    return {"prompt": prompt, "completion": answers[0], "label": unit.good}


def _prepare(job: Job, *, on_gpu: bool) -> None:
    """What axolotl reads; a checkpoint whose writing was cut off is none that it may go on from."""
    spec, folder, data = job.spec, job.folder, job.data
    write_jsonl(folder / DATA, data.rows)
    config = render(
        spec, folder, steps=len(data.tokens), on_gpu=on_gpu, at_once=_rows_at_once(job), kto_weights=data.weights
    )
    write_durably(folder / CONFIG, _yaml(config).encode())
    if spec.cards.sharding == "zero3":
        write_durably(folder / ZERO3, json.dumps(zero3_config(spec, on_gpu=on_gpu), indent=1).encode())
    forget_incomplete(folder / OUT)


def _rows_at_once(job: Job) -> int:
    """As many as the plan's tokens hold; all without a plan."""
    most, counts = job.spec.memory.micro_tokens, rows_at_once(job.spec)
    return next((count for count in counts if most is None or count * job.data.heaviest.least <= most), counts[-1])


def _yaml(config: dict[str, Any]) -> str:
    import yaml

    text: str = yaml.safe_dump(config, sort_keys=False, allow_unicode=True)
    return text


def _train(job: Job, channel: Channel) -> tuple[Any, int]:
    """axolotl's own steps: configuration (its schema refuses what is wrong), data, training. Its trainer at the end,
    and the most memory, in bytes, that a rank has taken. It leaves no process group: ranks are alone from there on.

    It goes on from the newest checkpoint there is.
    """
    from axolotl.cli.args import TrainerCliArgs
    from axolotl.cli.config import load_cfg
    from axolotl.common.datasets import load_datasets, load_preference_datasets
    from axolotl.train import train
    from transformers import set_seed

    from loop.trainers.axolotl_plugin import Told
    from loop.trainers.governor import Governor
    from loop.trainers.planned_run import Reporter

    spec, config = job.spec, job.folder / CONFIG
    checkpoint = last_complete(job.folder / OUT, job.digest)
    rate = spec.schedule.learning_rate if spec.method == "sft" else spec.preference.learning_rate
    spec = spec.model_copy(update={"schedule": spec.schedule.model_copy(update={"learning_rate": rate})})
    governor = Governor(job.pace, spec, channel, checkpoint)
    Told.schedule = spec.schedule
    Told.callbacks = governor, Reporter(channel, job.data.tokens, job.digest, governor)
    try:
        cfg = load_cfg(str(config))
    except ValidationError as error:
        mistakes = "; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors())
        raise NotByAxolotl(f"axolotl refuses {config}: {mistakes}") from None
    load = load_preference_datasets if cfg.rl else load_datasets
    data = load(cfg=cfg, cli_args=TrainerCliArgs())
    set_seed(spec.seed)  # axolotl sets it too, but only once the adapter has its first, random weights
    _, _, trainer = train(cfg=cfg, dataset_meta=data)
    governor.raise_if_parked(trainer.state.global_step)
    return trainer, Told.peak_bytes


def _write_result(job: Job, trainer: Any, seconds: float, peak: int) -> None:
    """`peak`: bytes, the highest of all ranks."""
    import torch
    from safetensors.torch import load_file

    from loop.trainers.adapter import write_adapter
    from loop.trainers.planned_run import LAST_STEPS

    spec, data = job.spec, job.data
    losses = [float(entry["loss"]) for entry in trainer.state.log_history if "loss" in entry][-LAST_STEPS:]
    steps = trainer.state.global_step
    # Of a model that is shared out, no rank has the weights: axolotl has gathered and saved them.
    weights = load_file(job.folder / OUT / "adapter_model.safetensors") if spec.cards.sharded else None
    result = TrainResult(
        run_digest=job.digest,
        steps=steps,
        examples=data.examples,
        tokens=sum(data.tokens[:steps]),
        seconds=round(seconds, 3),
        final_loss=sum(losses) / len(losses),
        method=spec.method,
        planned_steps=len(data.tokens),
        time_limited=job.pace.cut_short(steps),
        rate_scale=spec.limits.rate_scale,
        peak_memory_bytes=peak,
        adapter_files=write_adapter(trainer.model, spec.out_dir / "adapter", spec.base_name, weights),
        gpus=team().size,
        sharding=spec.cards.held,
        packages=versions(),
        device=torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        memory=job.memory.outcome(peak) if job.memory else None,
    )
    write_durably(spec.out_dir / "result.json", result.model_dump_json(indent=1).encode())


if __name__ == "__main__":
    sys.exit(live("Train one adapter with axolotl.", run, "loop.trainers.axolotl", apart=False))
