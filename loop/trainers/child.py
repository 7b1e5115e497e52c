"""The trainer as a process: reads the spec, never outlives its parent, and ends with a result file or an error line."""

from __future__ import annotations

import argparse
import ctypes
import importlib.metadata
import os
import shutil
import signal
import sys
import threading
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from labeling.errors import InvalidInput, NightschoolError
from loop.backends import FULL_ON_ONE_CARD
from loop.digests import write_durably
from loop.memory_estimate import Workload
from loop.trainers.launcher import Launch, launch, listen_for_parking
from loop.trainers.progress import Channel, RankChannel
from loop.trainers.rows import tokenise
from loop.trainers.spec import TrainResult, TrainSpec, read_result, read_rows, read_spec, run_digest, without_plan
from loop.trainers.team import join, take_seat, team

if TYPE_CHECKING:
    from loop.trainers.memory import RunMemory  # imports torch
    from loop.trainers.phases import Data
    from loop.trainers.rows import Example

PACKAGES = ("torch", "transformers", "trl", "peft", "bitsandbytes", "accelerate", "unsloth", "axolotl")
PR_SET_PDEATHSIG = 1
OFFLINE = {
    "HF_HUB_OFFLINE": "1",
    "TRANSFORMERS_OFFLINE": "1",
    "HF_DATASETS_OFFLINE": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "TOKENIZERS_PARALLELISM": "false",
}


class NoBaseModel(InvalidInput):
    code = "no_base_model"
    default_hint = "Set projects.base_dir to the local folder of the base: config.json, tokenizer.json, safetensors."


class NoTrainerPackages(InvalidInput):
    code = "no_trainer_packages"
    default_hint = "Install nightschool[train] there, or name another environment's Python in projects.trainer.python."


class NotByThisBackend(InvalidInput):
    code = "not_by_this_backend"
    default_hint = 'Set trainer.backend = "peft", or trainer.finetuning_type = "lora".'


class Stopped(NightschoolError):
    code = "stopped"
    default_hint = "Start the same spec again: it goes on from the last checkpoint."


class Unexpected(NightschoolError):
    code = "trainer_error"
    default_hint = "The trainer's log holds the traceback."


@dataclass(frozen=True)
class Backend:
    """`start` runs before any other import of the kind; `load` gives the base with a fresh adapter on it."""

    start: Callable[[], None]
    load: Callable[[TrainSpec, int], Any]  # second: tokens of the longest row
    name: str = "peft"


def main(backend: Backend) -> int:
    """The whole life of a trainer process; its exit status."""
    return live(
        "Train one adapter as a spec says.",
        lambda spec, _, channel: run(spec, backend, channel),
        module=f"loop.trainers.{backend.name}",
    )


def live(
    description: str, work: Callable[[TrainSpec, Path, Channel], None], module: str = "", *, apart: bool = True
) -> int:
    """The life of a process that works on a spec in the trainer's environment; `work` also gets the spec's folder.

    `module`: what to run as each rank, where the spec asks for several. `apart`: as in `take_seat`.
    """
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("spec", type=Path)
    parser.add_argument("--parent", type=int, help="process id; the trainer ends when it does")
    arguments = parser.parse_args()
    if arguments.parent is not None:
        die_with(arguments.parent)
    signal.signal(signal.SIGTERM, _stop)
    os.environ.update(OFFLINE)
    seat = take_seat(apart=apart)
    channel = Channel() if seat is None else RankChannel(seat)
    listen_for_parking(channel)
    if seat is not None:
        _end_when_told(channel)
    status = _worked(arguments.spec, work, channel, Launch(module, by_us=apart))
    if seat is None:
        return status
    sys.stderr.flush()
    os._exit(status)  # at once: what the ranks share would wait here for those that are to end because of us


def _worked(path: Path, work: Callable[[TrainSpec, Path, Channel], None], channel: Channel, ranks: Launch) -> int:
    """The exit status."""
    try:
        spec = read_spec(path)
        if ranks.module and spec.cards.launched and channel.seat is None:
            return launch(ranks, spec, path, channel)
        work(spec, path.parent, channel)
    except NightschoolError as error:
        channel.error(error)
        return 128 + signal.SIGTERM if error.code == Stopped.code else 1
    except Exception as error:  # noqa: BLE001 - the edge of the process: the parent gets a line, the log the traceback
        traceback.print_exc()
        channel.error(_explained(error))
        return 70
    return 0


def die_with(parent: int) -> None:
    """Also when the parent is killed with SIGKILL: the kernel sends the signal, whatever state it dies in."""
    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:  # it died before the line above
        sys.exit(128 + signal.SIGKILL)


def _end_when_told(channel: Channel) -> None:
    """Of a rank, wherever it is: one that waits for ranks which have left would hear of nothing else."""
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})

    def end() -> None:
        signal.sigwait({signal.SIGTERM})
        channel.error(Stopped("the trainer was told to stop (SIGTERM)"))
        os._exit(128 + signal.SIGTERM)

    threading.Thread(target=end, name="end", daemon=True).start()


def _stop(*_: object) -> None:
    raise Stopped("the trainer was told to stop (SIGTERM)")


def _explained(error: Exception) -> NightschoolError:
    if isinstance(error, ModuleNotFoundError):
        return NoTrainerPackages(f"the trainer's environment lacks the package {error.name}")
    from loop.trainers.memory import is_out_of_memory
    from loop.trainers.sft_loop import OutOfMemory

    text = str(error)
    if is_out_of_memory(error):
        return OutOfMemory(f"no memory left: {text.splitlines()[0] if text else 'allocation failed'}")
    return Unexpected(f"{type(error).__name__}: {text}"[:2000])


def run(spec: TrainSpec, backend: Backend, channel: Channel) -> None:
    """Nothing to do where the same run has finished in this folder."""
    rows = read_rows(spec.data_dir, may_be_none=spec.method != "sft")
    if spec.finetuning_type == "full" and backend.name != "peft":
        raise NotByThisBackend(f"the {backend.name} backend does no full fine-tune that an adapter could carry")
    if spec.finetuning_type == "full" and spec.cards.launched:
        what, cure = FULL_ON_ONE_CARD
        raise NotByThisBackend(what, hint=cure)
    digest = unfinished(spec)
    if digest is None:
        return
    backend.start()
    join(channel.seat, sharded=spec.cards.sharded)
    import torch
    from transformers import set_seed

    from loop.trainers.token_store import FOLDER, kept

    channel.mark("imported")
    if spec.threads is not None:
        torch.set_num_threads(spec.threads)
    tokenizer = load_tokenizer(spec)
    stops = stop_ids(spec.base_dir, tokenizer)
    made = partial(tokenise, rows, tokenizer, stops, spec.lengths.max_length)
    data = _data(spec, kept(spec.out_dir / FOLDER, digest, made), tokenizer, stops)
    spec, memory = planned_memory(spec, backend.name, data.heaviest(spec), digest)
    set_seed(spec.seed)  # the adapter's first weights are random
    model = backend.load(spec, data.longest)
    if spec.start is not None:
        from loop.trainers.start_adapter import start_from

        start_from(model, spec.start, spec.lora, spec.finetuning_type)
    channel.mark("loaded")
    _train_and_write(spec, model, tokenizer, data, digest, channel, memory)


def unfinished(spec: TrainSpec) -> str | None:
    """The digest of the run that is to be made; None where it has finished in this folder."""
    digest = run_digest(spec)
    finished = read_result(spec.out_dir)
    if finished is not None and finished.run_digest == digest:
        return None
    if not (spec.base_dir / "config.json").exists():
        raise NoBaseModel(f"there is no model at {spec.base_dir}")
    return digest


def planned_memory(
    spec: TrainSpec, backend: str, heaviest: Workload, digest: str
) -> tuple[TrainSpec, RunMemory | None]:
    """The spec as the run's plan settles it, and the plan, limits set; `heaviest`: of all steps. No plan for a base of
    unknown shape."""
    from loop.trainers.memory import settle
    from loop.trainers.planned_run import compute_dtype

    memory = settle(spec, backend, heaviest, digest, compute_dtype())
    if memory is not None:
        memory.limit()
    _limit_memory(spec)
    return memory.settled(spec) if memory else without_plan(spec), memory


def _limit_memory(spec: TrainSpec) -> None:
    """The GPU's, to the share that production leaves; a smaller budget of the memory plan holds on."""
    import torch

    share = spec.limits.memory_share
    if share is not None and torch.cuda.is_available():
        torch.cuda.set_per_process_memory_fraction(min(share, torch.cuda.get_per_process_memory_fraction()))


def _data(spec: TrainSpec, examples: list[Example], tokenizer: Any, stop_ids: frozenset[int]) -> Data:
    from loop.trainers.phases import Data, preference_units

    return Data(examples, preference_units(spec, tokenizer, stop_ids))


def _train_and_write(
    spec: TrainSpec,
    model: Any,
    tokenizer: Any,
    data: Data,
    digest: str,
    channel: Channel,
    memory: RunMemory | None,
) -> None:
    from loop.trainers.adapter import write_adapter
    from loop.trainers.checkpoints import CHECKPOINTS
    from loop.trainers.extraction import extract
    from loop.trainers.phases import train_phases
    from loop.trainers.token_store import FOLDER

    trained = train_phases(spec, model, tokenizer, data, digest, channel, memory)
    if not team().leads:
        return
    full = extract(trained.model, spec.lora, spec.seed) if spec.finetuning_type == "full" else None
    weights = full.weights if full else None
    result = TrainResult(
        run_digest=digest,
        steps=trained.steps,
        examples=data.examples,
        tokens=trained.tokens,
        seconds=trained.seconds,
        final_loss=trained.final_loss,
        method=spec.method,
        start=spec.start.name if spec.start else "base",
        final_margin=trained.final_margin,
        unquantised_steps=trained.unquantised_steps,
        packed=trained.packed,
        not_packed=trained.not_packed,
        phases=channel.phases,
        planned_steps=trained.planned_steps,
        time_limited=trained.time_limited,
        rate_scale=spec.limits.rate_scale,
        peak_memory_bytes=trained.peak_memory_bytes,
        adapter_files=write_adapter(trained.model, spec.out_dir / "adapter", spec.base_name, weights),
        packages=versions(),
        device=trained.device,
        finetuning_type=spec.finetuning_type,
        extraction=full.outcome if full else None,
        gpus=team().size,
        sharding=spec.cards.held,
        memory=memory.outcome(trained.peak_memory_bytes) if memory else None,
    )
    write_durably(spec.out_dir / "result.json", result.model_dump_json(indent=1).encode())
    for folder in (spec.out_dir / CHECKPOINTS, spec.out_dir / FOLDER, *spec.out_dir.glob("phase-*")):
        shutil.rmtree(folder, ignore_errors=True)


def load_tokenizer(spec: TrainSpec) -> Any:
    """The base's, with the project's own chat template where it has one. The audit uses this very function."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(spec.base_dir, local_files_only=True, trust_remote_code=False)
    if spec.chat_template is not None:
        tokenizer.chat_template = spec.chat_template.read_text(encoding="utf-8")
    return tokenizer


def stop_ids(base_dir: Path, tokenizer: Any) -> frozenset[int]:
    """Every token that ends an answer of this base: some families have several."""
    from transformers import GenerationConfig

    ids = {tokenizer.eos_token_id}
    if (base_dir / "generation_config.json").exists():
        configured = GenerationConfig.from_pretrained(base_dir, local_files_only=True).eos_token_id
        ids |= set(configured if isinstance(configured, list) else [configured])
    return frozenset(ids - {None})


def versions() -> dict[str, str]:
    installed = {name: _version(name) for name in PACKAGES}
    return {name: version for name, version in installed.items() if version}


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None
