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
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from labeling.errors import InvalidInput, NightschoolError
from loop.digests import write_durably, write_jsonl
from loop.trainers.axolotl_config import CONFIG, DATA, OUT, render
from loop.trainers.checkpoints import forget_incomplete, last_complete
from loop.trainers.child import limit_memory, live, load_tokenizer, stop_ids, unfinished, versions
from loop.trainers.launch_config import ZERO3, zero3_config
from loop.trainers.pace import Pace
from loop.trainers.preference_rows import Unit, kto_weights, plan_units
from loop.trainers.progress import Channel
from loop.trainers.rows import Example, UnfitTemplate, plan_examples, tokenise
from loop.trainers.spec import TrainResult, TrainSpec, read_rows
from loop.trainers.team import join, team

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
    limit_memory(spec)
    tokenizer = load_tokenizer(spec)
    folder = _folder(spec, digest)
    folder.mkdir(parents=True, exist_ok=True)
    data = _data(spec, tokenizer)
    tokens = data.tokens
    if team().leads:
        write_jsonl(folder / DATA, data.rows)
        config = render(spec, folder, steps=len(tokens), on_gpu=torch.cuda.is_available(), kto_weights=data.weights)
        write_durably(folder / CONFIG, _yaml(config).encode())
        if spec.cards.sharding == "zero3":
            write_durably(folder / ZERO3, json.dumps(zero3_config(spec), indent=1).encode())
        forget_incomplete(folder / OUT)
    team().wait()
    since = time.monotonic()
    pace = Pace(spec.schedule, len(tokens), spec.limits.seconds)
    trainer = _train(spec, folder, channel, tokens, digest, pace)
    team().wait()
    if not team().leads:
        return
    saved = folder / OUT / "adapter_model.safetensors" if spec.cards.sharded else None
    _write_result(spec, trainer, digest, data, time.monotonic() - since, pace, saved)
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
    weights: tuple[float, float] = (1.0, 1.0)


def _data(spec: TrainSpec, tokenizer: Any) -> Data:
    stops, longest = stop_ids(spec.base_dir, tokenizer), spec.lengths.max_length
    if spec.method == "sft":
        examples = tokenise(read_rows(spec.data_dir), tokenizer, stops, longest)
        plan, _ = plan_examples(examples, spec.schedule, spec.seed)
        order = [row for batch in plan for row in batch]
        size = spec.schedule.batch_size
        steps = [order[start : start + size] for start in range(0, len(order), size)]
        tokens = [sum(len(examples[row].tokens) for row in step) for step in steps]
        return Data([_tokenised(examples[row]) for row in order], tokens, len(examples))
    from loop.trainers.phases import preference_units

    if spec.method not in ("dpo", "kto") or spec.start is not None:
        raise NotByAxolotl(f"axolotl does not train {spec.method!r} here, nor on top of an adapter")
    units = preference_units(spec, tokenizer, stops)
    plan_of_units = plan_units(units, [], spec.schedule, spec.seed)
    weights = kto_weights(units) if spec.method == "kto" else (1.0, 1.0)
    tokens = [sum(units[n].tokens for n in step) for step, _ in plan_of_units]
    return Data([_texts(unit, tokenizer) for unit in units], tokens, len(units), weights)


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


def _yaml(config: dict[str, Any]) -> str:
    import yaml

    text: str = yaml.safe_dump(config, sort_keys=False, allow_unicode=True)
    return text


def _train(spec: TrainSpec, folder: Path, channel: Channel, tokens: Sequence[int], digest: str, pace: Pace) -> Any:
    """axolotl's own steps: configuration (its schema refuses what is wrong), data, training; its trainer at the end.

    It goes on from the newest checkpoint there is: one whose writing was cut off is removed before.
    """
    from axolotl.cli.args import TrainerCliArgs
    from axolotl.cli.config import load_cfg
    from axolotl.common.datasets import load_datasets, load_preference_datasets
    from axolotl.train import train

    from loop.trainers.axolotl_plugin import Told
    from loop.trainers.governor import Governor
    from loop.trainers.planned_run import Reporter

    checkpoint = last_complete(folder / OUT, digest)
    rate = spec.schedule.learning_rate if spec.method == "sft" else spec.preference.learning_rate
    spec = spec.model_copy(update={"schedule": spec.schedule.model_copy(update={"learning_rate": rate})})
    governor = Governor(pace, spec, channel, checkpoint)
    Told.callbacks = governor, Reporter(channel, tokens, digest, governor)
    try:
        cfg = load_cfg(str(folder / CONFIG))
    except ValidationError as error:
        mistakes = "; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors())
        raise NotByAxolotl(f"axolotl refuses {folder / CONFIG}: {mistakes}") from None
    load = load_preference_datasets if cfg.rl else load_datasets
    _, _, trainer = train(cfg=cfg, dataset_meta=load(cfg=cfg, cli_args=TrainerCliArgs()))
    governor.raise_if_parked(trainer.state.global_step)
    return trainer


def _write_result(
    spec: TrainSpec, trainer: Any, digest: str, data: Data, seconds: float, pace: Pace, saved: Path | None
) -> None:
    import torch
    from safetensors.torch import load_file

    from loop.trainers.adapter import write_adapter
    from loop.trainers.planned_run import LAST_STEPS, peak_memory_bytes

    losses = [float(entry["loss"]) for entry in trainer.state.log_history if "loss" in entry][-LAST_STEPS:]
    steps = trainer.state.global_step
    weights = load_file(saved) if saved else None
    result = TrainResult(
        run_digest=digest,
        steps=steps,
        examples=data.examples,
        tokens=sum(data.tokens[:steps]),
        seconds=round(seconds, 3),
        final_loss=sum(losses) / len(losses),
        method=spec.method,
        planned_steps=len(data.tokens),
        time_limited=pace.cut_short(steps),
        rate_scale=spec.limits.rate_scale,
        peak_memory_bytes=peak_memory_bytes(),
        adapter_files=write_adapter(trainer.model, spec.out_dir / "adapter", spec.base_name, weights),
        gpus=team().size,
        sharding=spec.cards.held,
        packages=versions(),
        device=torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
    )
    write_durably(spec.out_dir / "result.json", result.model_dump_json(indent=1).encode())


if __name__ == "__main__":
    sys.exit(live("Train one adapter with axolotl.", run, "loop.trainers.axolotl", apart=False))
