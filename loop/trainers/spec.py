"""What the parent tells a trainer, and what comes back. No torch here: both sides read this module."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Annotated, Any, Literal, Self, TypeVar

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError, model_validator

from labeling.errors import InvalidInput
from labeling.settings import Strict
from loop.digests import write_durably
from loop.memory_plan import Plan
from loop.memory_record import MemoryOutcome
from loop.methods import Method
from loop.settings import LINEAR_LAYERS, TrainerSettings

ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors")
ROWS_FILE = "train.jsonl"
PAIRS_FILE, THUMBS_FILE = "pairs.jsonl", "thumbs.jsonl"
Sharding = Literal["auto", "replicate", "fsdp", "zero3"]
# `cards`: the steps are the same on any number of them, but for the order of sums, and checkpoints hold no part of one.
NOT_DECISIVE = (
    *("out_dir", "data_dir", "base_dir", "chat_template", "threads", "needs_gpu", "memory", "limits"),
    "cards",
)


class BadSpec(InvalidInput):
    code = "bad_spec"
    default_hint = "The spec is written by the preflight stage; parent and trainer must be of the same release."


class BadRows(InvalidInput):
    """Training rows that cannot be trained on; the message names them."""

    code = "bad_rows"


class LoraSpec(Strict):
    rank: int = Field(16, ge=1, le=512)
    alpha: float = Field(32, gt=0, le=1024)
    dropout: float = Field(0.0, ge=0, lt=1)
    target_modules: tuple[Annotated[str, Field(pattern=r"^[A-Za-z0-9_.]+$")], ...] = Field(LINEAR_LAYERS, min_length=1)


class ScheduleSpec(Strict):
    learning_rate: float = Field(2e-3, gt=0, le=1)
    epochs: float = Field(4, gt=0, le=1000, description="Passes over the labels")
    min_steps: int = Field(1, ge=1, le=10_000, description="Few labels are passed over more often, up to this")
    replay_share: float = Field(0.4, ge=0, le=0.9, description="Of the rows of every batch")
    max_steps: int | None = Field(None, ge=1, le=10_000_000)
    batch_size: int = Field(8, ge=1, le=4096)
    warmup_share: float = Field(0.1, ge=0, le=1)
    scheduler: Literal["one_cycle", "cosine", "linear", "constant"] = "linear"
    optimizer: Literal["adamw", "adamw_8bit"] = "adamw"
    max_grad_norm: float = Field(1.0, gt=0, le=1000)
    save_steps: int = Field(250, ge=1)
    replay_loss: Literal["ce", "kl"] = "kl"
    kl_weight: float = Field(1.35, ge=0, le=100)
    finish_share: float = Field(0.0, ge=0, lt=1, description="Last share of the steps, on the unquantised base")


class LengthsSpec(Strict):
    max_length: int = Field(1024, ge=16, le=1_000_000, description="Tokens of a whole row, template included")
    packing: Literal["auto", "on", "off"] = "auto"
    at_once: int | None = Field(None, ge=1, description="Most tokens at once; a step with more is trained in parts")


class MemorySpec(Strict):
    """How much memory a run may take, and the plans for it: the preflight's, made anew where they can't hold."""

    budget_gib: float | None = Field(None, gt=0, le=100_000, description="None: `share` of what is free")
    share: float = Field(0.9, gt=0, le=1)
    checkpointing: Literal["auto", "off", "on", "offload"] = "auto"
    micro_tokens: int | None = Field(None, ge=1, description="Most tokens at once; None: as the plan says")
    plans: tuple[Plan, ...] = Field((), description="The first is followed; each next one takes clearly less")


class PreferenceSpec(Strict):
    """Of dpo, orpo and kto. `beta`: how strongly the base holds; for orpo the weight of the odds ratio."""

    beta: float = Field(0.1, gt=0, le=100)
    learning_rate: float = Field(2e-4, gt=0, le=1)


class StartSpec(Strict):
    """An adapter of the same base, rank and layers to go on from, instead of from the base."""

    folder: Path
    name: str = Field(min_length=1, max_length=200)
    digest: str = Field(min_length=1, max_length=200)


class LimitsSpec(Strict):
    """What this attempt may take; it decides when a run ends and how it is kept, not what is trained.

    `seconds` from the start of the process: the schedule is fitted into them, and the run ends with a usable adapter.
    `rate_scale` is what roll backs have left of the learning rate; `memory_share` the GPU's that may be allocated.
    """

    seconds: float | None = Field(None, gt=0, le=1e7)
    save_minutes: float | None = Field(None, gt=0, le=1440)
    rate_scale: float = Field(1.0, gt=0, le=1)
    memory_share: float | None = Field(None, gt=0, le=1)


class CardsSpec(Strict):
    """How many cards of this machine train together, and what each holds of the base: all of it, or its share."""

    gpus: int = Field(1, ge=1, le=64)
    sharding: Sharding = "auto"

    @property
    def sharded(self) -> bool:
        return self.sharding in ("fsdp", "zero3")

    @property
    def launched(self) -> bool:
        """By accelerate's launcher, a process a card. One card with the base whole on it is the trainer alone."""
        return self.gpus > 1 or self.sharded

    @property
    def held(self) -> Sharding:
        """How the base lies on the cards, once a plan is followed."""
        return self.sharding if self.launched else "replicate"


class TrainSpec(Strict):
    """One training run. `base_name` is the served base's name: the adapter is written for it, not for `base_dir`."""

    version: Literal[1] = 1
    base_dir: Path
    base_name: str = Field(min_length=1, max_length=200)
    base_digest: str = Field(min_length=1, max_length=200)
    data_dir: Path = Field(description=f"Holds {ROWS_FILE}")
    chat_template: Path | None = Field(None, description="Used instead of the base's own")
    template_digest: str = Field("", max_length=200, description="Of the template in force")
    method: Method = "sft"
    start: StartSpec | None = None
    finetuning_type: Literal["lora", "full"] = "lora"
    quantisation: Literal["nf4", "none"] = "nf4"
    lora: LoraSpec = Field(LoraSpec(), description="Of a full fine-tune: the adapter to be extracted, and its layers")
    schedule: ScheduleSpec = ScheduleSpec()
    preference: PreferenceSpec = PreferenceSpec()
    lengths: LengthsSpec = LengthsSpec()
    memory: MemorySpec = MemorySpec()
    limits: LimitsSpec = LimitsSpec()
    cards: CardsSpec = CardsSpec()
    seed: int = Field(0, ge=0, lt=2**31)
    threads: int | None = Field(None, ge=1, le=1024)
    needs_gpu: bool = Field(False, description="The backend trains on nothing else")
    out_dir: Path

    @model_validator(mode="after")
    def _full_in_full(self) -> Self:
        if self.finetuning_type == "full" and self.quantisation != "none":
            raise ValueError('finetuning_type "full" trains the weights themselves: quantisation must be "none"')
        return self

    @model_validator(mode="after")
    def _finishes_on_what_is_there(self) -> Self:
        if self.cards.sharded and self.schedule.finish_share:
            raise ValueError("finish_share must be 0 where the base is shared out among the cards")
        return self


class Message(Strict):
    role: Literal["system", "user", "assistant", "tool"]
    content: str


class Answered(Strict):
    """A conversation whose last message is the answer."""

    id: str = Field(min_length=1)
    messages: tuple[Message, ...] = Field(min_length=2)

    @model_validator(mode="after")
    def _ends_with_an_answer(self) -> Self:
        if self.messages[-1].role != "assistant" or not self.messages[-1].content.strip():
            raise ValueError("the last message must be the assistant's, and not empty")
        return self


class Row(Answered):
    """The loss is on its last message only."""

    kind: Literal["label", "replay"]


class Progress(Strict):
    """One line of a trainer's stdout. `memory_bytes` is the accelerator's where there is one, else this process's."""

    step: int
    total_steps: int
    loss: float
    grad_norm: float
    learning_rate: float
    tokens_per_s: float
    memory_bytes: int
    elapsed_s: float
    seconds_left: float | None = None  # until the last step, at the speed of the last ones
    unquantised: bool = False  # on the base as it is served: another speed, another memory
    time_limited: bool = False  # not all steps of the plan fit into the time allowed
    objective: str | None = None  # of this part of the method: sft, dpo, orpo or kto
    margin: float | None = None  # of dpo, orpo: chosen above rejected, mean summed log-probability, in nats


class Extraction(Strict):
    """What an adapter keeps of a full fine-tune: shares, 0..1, of the trained change's squared Frobenius norm."""

    kept_share: float
    least_kept_share: float  # of a single layer
    least_kept_layer: str


class TrainResult(Strict):
    """`result.json`. `seconds` and `tokens` are of the whole plan, except that a resumed run counts its own seconds."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    version: Literal[1] = 1
    run_digest: str
    steps: int
    examples: int
    tokens: int
    seconds: float
    final_loss: float
    method: str = "sft"
    start: str = "base"  # or the adapter that it went on from
    final_margin: float | None = None  # as `Progress.margin`, over the last steps
    unquantised_steps: int = 0  # the last ones, on the base as it is served
    packed: bool = False  # rows end to end in one sequence; else padded, and `not_packed` says why
    not_packed: str = ""
    phases: dict[str, float] = Field(default_factory=dict)  # seconds from the trainer's start to each of its milestones
    planned_steps: int | None = None
    time_limited: bool = False  # fewer steps than planned, the learning rate brought down before the end
    rate_scale: float = 1.0  # below 1 after roll backs
    peak_memory_bytes: int
    adapter_files: dict[str, str]
    packages: dict[str, str]
    device: str
    finetuning_type: str = "lora"
    extraction: Extraction | None = None  # of a full fine-tune
    gpus: int = 1  # ranks that trained together
    sharding: Sharding = "replicate"
    memory: MemoryOutcome | None = None  # None where the base's shape is not known


def render(
    settings: TrainerSettings,
    *,
    base_dir: Path,
    base_name: str,
    base_digest: str,
    data_dir: Path,
    out_dir: Path,
    chat_template: Path | None = None,
    template_digest: str = "",
    method: Method = "sft",
    start: StartSpec | None = None,
) -> TrainSpec:
    """The project's recipe as a spec. `method`: what the night's data have settled."""
    flat = settings.model_dump()
    cards = CardsSpec(gpus=settings.gpus, sharding=settings.sharding)
    if settings.backend != "peft" or cards.sharded:
        # Unsloth's layers are its own, and those that are shared out no card has whole: none can be exchanged.
        flat["finish_share"] = 0.0

    flat["learning_rate"], preference_rate = settings.rates

    def pick(model: type[Strict]) -> dict[str, Any]:
        return {name: flat[name] for name in model.model_fields}

    return TrainSpec(
        base_dir=base_dir,
        base_name=base_name,
        base_digest=base_digest,
        data_dir=data_dir,
        chat_template=chat_template,
        template_digest=template_digest,
        method=method,
        start=start,
        finetuning_type=flat["finetuning_type"],
        quantisation=flat["quantisation"],
        lora=LoraSpec(**pick(LoraSpec)),
        schedule=ScheduleSpec(**pick(ScheduleSpec)),
        preference=PreferenceSpec(beta=settings.preference_beta, learning_rate=preference_rate),
        lengths=LengthsSpec(max_length=settings.max_length, packing=flat["packing"]),
        memory=MemorySpec(
            budget_gib=settings.memory_budget_gib,
            share=settings.memory_share,
            checkpointing=settings.checkpointing,
            micro_tokens=settings.micro_tokens,
        ),
        limits=LimitsSpec(save_minutes=settings.save_minutes, memory_share=settings.truce.memory_share),
        cards=cards,
        seed=settings.seed,
        threads=settings.threads,
        needs_gpu=settings.backend == "unsloth",
        out_dir=out_dir,
    )


def with_sharding(spec: TrainSpec, sharding: Sharding) -> TrainSpec:
    """A base that is shared out has no finish on the served one."""
    cards = spec.cards.model_copy(update={"sharding": sharding})
    changed: dict[str, Any] = {"cards": cards}
    if cards.sharded:
        changed["schedule"] = spec.schedule.model_copy(update={"finish_share": 0.0})
    return spec.model_copy(update=changed)


def without_plan(spec: TrainSpec) -> TrainSpec:
    """For a base whose memory can't be told: as the settings say, and where they leave it open, all is kept."""
    if spec.memory.checkpointing != "auto":
        return spec
    return spec.model_copy(update={"memory": spec.memory.model_copy(update={"checkpointing": "off"})})


def write_spec(spec: TrainSpec, path: Path) -> None:
    write_durably(path, spec.model_dump_json(indent=1).encode())


def read_spec(path: Path) -> TrainSpec:
    """Every mistake of the spec in one message."""
    try:
        return TrainSpec.model_validate_json(path.read_bytes())
    except FileNotFoundError:
        raise BadSpec(f"there is no training spec at {path}") from None
    except ValidationError as error:
        raise BadSpec(f"the training spec {path} is not valid: {_mistakes(error)}") from None


def read_result(out_dir: Path) -> TrainResult | None:
    """None until the trainer has finished: the file is written last."""
    path = out_dir / "result.json"
    return TrainResult.model_validate_json(path.read_bytes()) if path.exists() else None


T = TypeVar("T")
_ROW = TypeAdapter(Row)


def read_rows(data_dir: Path, *, may_be_none: bool = False) -> list[Row]:
    """`may_be_none`: where pairs or thumbs are trained on, and there is no replay."""
    path = data_dir / ROWS_FILE
    if not path.exists():
        raise BadRows(f"there are no training rows at {path}", hint="Run the build_delta stage first.")
    rows = read_lines(path, _ROW)
    if not rows and not may_be_none:
        raise BadRows(f"{path} holds no rows", hint="A night needs labels; see min_labels.")
    return rows


def read_lines(path: Path, kind: TypeAdapter[T]) -> list[T]:
    """JSON lines of one kind; raises BadRows with the mistakes of the first five that are none."""
    rows, mistakes = [], []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        try:
            rows.append(kind.validate_json(line))
        except ValidationError as error:
            mistakes.append(f"line {number}: {_mistakes(error)}")
    if mistakes:
        raise BadRows(f"{len(mistakes)} rows of {path} are not training rows: {'; '.join(mistakes[:5])}")
    return rows


def run_digest(spec: TrainSpec) -> str:
    """Of all that decides the adapter: the spec but for its places and limits, and the rows. A checkpoint of another
    digest is never resumed."""
    aside: dict[str, Any] = dict.fromkeys(NOT_DECISIVE, True)
    decisive = spec.model_dump(mode="json", exclude={**aside, "start": {"folder"}})
    digest = hashlib.sha256(json.dumps(decisive, sort_keys=True).encode())
    for name in (ROWS_FILE, PAIRS_FILE, THUMBS_FILE):
        if (spec.data_dir / name).exists():
            digest.update(name.encode() + (spec.data_dir / name).read_bytes())
    return f"sha256:{digest.hexdigest()}"


def _mistakes(error: ValidationError) -> str:
    return "; ".join(f"{'.'.join(map(str, item['loc'])) or 'row'}: {item['msg']}" for item in error.errors())
