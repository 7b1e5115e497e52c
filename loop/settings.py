"""Settings of a night: engine, registry, archive, schedule, trainer, replay, gate, approval. Values only."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import time
from enum import StrEnum
from pathlib import Path
from typing import Any, Literal
from zoneinfo import ZoneInfo, available_timezones

from pydantic import Field, SecretStr, ValidationError, field_validator, model_validator

from labeling.errors import InvalidInput
from labeling.settings import LabelingSettings, ServerUrl, Strict
from loop.methods import PATTERN as METHOD_PATTERN
from loop.watch.settings import AlarmSettings, CostSettings, TruceSettings

RATES = {"lora": (2e-3, 2e-4), "full": (1e-4, 1e-5)}  # of sft and of preferences (docs/methods.md)
LINEAR_LAYERS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


class BadRecipe(InvalidInput):
    code = "bad_recipe"
    default_hint = "A recipe replaces keys of [projects.trainer] for one night."


class ReplicaSettings(Strict):
    url: ServerUrl = Field(min_length=1, description="Root of one vLLM, without /v1")
    adapter_dir: str = Field("", description="Our adapters folder as that vLLM sees it; empty = the same path as here")


VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # what --max-lora-rank may be


class EngineSettings(Strict):
    """[vllm]: the engine that serves one base model."""

    managed: bool = Field(False, description="Started by `nightschool up` as a child")
    replicas: tuple[ReplicaSettings, ...] = ()
    api_key: SecretStr | None = None
    device: str = Field("cpu", pattern="^(cpu|cuda)$", description="For managed engines")
    dtype: str = Field("bfloat16", pattern="^(bfloat16|float16|float32)$")
    max_model_len: int = Field(1024, ge=128, le=1_000_000)
    max_num_seqs: int = Field(32, ge=1, le=1024)
    max_loras: int = Field(
        5, ge=5, le=64, description="One above the adapters ever registered: slot -1 is the base on CPU"
    )
    max_lora_rank: int = Field(16, ge=1, le=512)
    kv_cache_gib: int = Field(1, ge=1, le=1024, description="CPU engines only")
    threads: int = Field(2, ge=1, le=256, description="CPU engines only")
    sleep_mode: bool = Field(
        False, description="Managed CUDA engines: vLLM's, for trainer.truce.sleep; opens its development endpoints"
    )
    extra_args: tuple[str, ...] = ()
    start_timeout_seconds: float = Field(300.0, gt=0, le=3600)
    examination: str = Field(
        "own", pattern="^(own|replica)$", description="own: a child engine for the gate; replica: the first replica"
    )

    @model_validator(mode="after")
    def _one_of(self) -> EngineSettings:
        if self.managed and self.replicas:
            raise ValueError("managed = true and replicas exclude each other: keep one")
        if self.sleep_mode and self.device != "cuda":
            raise ValueError('sleep_mode needs device = "cuda": vLLM on a CPU has no sleep mode')
        return self


class MlflowSettings(Strict):
    managed: bool = False
    url: ServerUrl = ""
    username: str = ""
    password: SecretStr | None = None
    timeout_seconds: float = Field(30.0, gt=0, le=600)
    poll_seconds: float = Field(2.0, ge=0.2, le=3600, description="Between two looks at the aliases")

    @model_validator(mode="after")
    def _one_of(self) -> MlflowSettings:
        if self.managed and self.url:
            raise ValueError("managed = true and url exclude each other: keep one")
        return self


class ObjectStoreSettings(Strict):
    """[object_store]: the archive of data, adapters and reports."""

    kind: str = Field("folder", pattern="^(folder|s3)$")
    folder: Path | None = Field(None, description="folder: where; empty = archive/ in the data directory")
    endpoint: str = Field("", description="s3: host:port")
    bucket: str = "nightschool"
    region: str = "us-east-1"
    secure: bool = Field(True, description="s3: TLS; false is your explicit choice")
    access_key: SecretStr | None = None
    secret_key: SecretStr | None = None

    @model_validator(mode="after")
    def _complete(self) -> ObjectStoreSettings:
        if self.kind == "s3" and not (self.endpoint and self.access_key and self.secret_key):
            raise ValueError('kind = "s3" needs endpoint, access_key and secret_key')
        return self


class ScheduleSettings(Strict):
    enabled: bool = True
    at: time = Field(time(2, 0), description="Local time of the nightly claim")
    time_zone: str = Field("UTC", description="IANA name")

    @field_validator("time_zone")
    @classmethod
    def _known(cls, value: str) -> str:
        if value not in available_timezones():
            raise ValueError(f"unknown time zone {value!r}: use an IANA name such as Europe/Helsinki")
        return value

    @property
    def zone(self) -> ZoneInfo:
        return ZoneInfo(self.time_zone)


class TrainerSettings(Strict):
    """[projects.trainer]: one recipe, rendered for each backend."""

    backend: str = Field("peft", pattern="^(peft|unsloth|axolotl)$")
    python: str = Field("", description="Python of the trainer's environment; empty = this one")
    method: str = Field("auto", pattern=METHOD_PATTERN, description="auto: by the data on hand (docs/methods.md)")
    start: str = Field(
        "base", pattern="^(base|current)$", description="current: go on from the adapter that serves, not from the base"
    )
    min_thumbs: int = Field(16, ge=2, le=1_000_000, description="For kto: of thumbs up and of thumbs down, new ones")
    preference_beta: float = Field(
        0.1, gt=0, le=100, description="dpo, kto: how strongly the base holds; orpo: weight of the odds ratio"
    )
    preference_learning_rate: float | None = Field(
        None, gt=0, le=1, description="Of dpo, orpo and kto; unless given 2e-4, of a full fine-tune 1e-5"
    )
    finetuning_type: Literal["lora", "full"] = Field(
        "lora",
        description="full: the weights of target_modules themselves; an adapter of this rank is extracted in the end",
    )
    quantisation: str = Field("nf4", pattern="^(nf4|none)$")
    rank: int = Field(16, ge=1, le=512)
    alpha: float = Field(32, gt=0, le=1024)
    dropout: float = Field(0.0, ge=0, lt=1)
    target_modules: tuple[str, ...] = LINEAR_LAYERS
    learning_rate: float | None = Field(
        None, gt=0, le=1, description="Of sft; unless given 2e-3, of a full fine-tune 1e-4"
    )
    epochs: float = Field(4, gt=0, le=1000, description="Passes over the labels")
    min_steps: int = Field(80, ge=1, le=10_000, description="Few labels are passed over more often, up to this")
    replay_share: float = Field(0.4, ge=0, le=0.9, description="Of the rows of every batch; 0 = no replay")
    max_steps: int | None = Field(None, ge=1)
    batch_size: int = Field(8, ge=1, le=4096)
    warmup_share: float = Field(0.1, ge=0, le=1)
    scheduler: str = Field("linear", pattern="^(one_cycle|cosine|linear|constant)$")
    optimizer: str = Field(
        "adamw", pattern="^(adamw|adamw_8bit)$", description="adamw_8bit keeps its state in a quarter of the memory"
    )
    max_grad_norm: float = Field(1.0, gt=0)
    save_steps: int = Field(250, ge=1)
    save_minutes: float | None = Field(10, gt=0, le=1440, description="A checkpoint at least so often, too")
    max_length: int = Field(1024, ge=16, le=1_000_000)
    packing: str = Field(
        "auto",
        pattern="^(auto|on|off)$",
        description="Rows end to end in one sequence; auto: where no row can see another, else padded",
    )
    seed: int = Field(0, ge=0, lt=2**31)
    threads: int | None = Field(None, ge=1)
    gpus: int = Field(1, ge=1, le=64, description="Cards of this machine that train together (docs/several-cards.md)")
    sharding: Literal["auto", "replicate", "fsdp", "zero3"] = Field(
        "auto",
        description="The base whole on each card (replicate), or shared out (fsdp; zero3: axolotl's); auto: what fits",
    )
    replay_loss: str = Field(
        "kl", pattern="^(ce|kl)$", description="How replay rows hold the model: cross entropy, or KL to the base"
    )
    kl_weight: float = Field(1.35, ge=0, le=100, description="Of the mean KL beside the mean cross entropy")
    finish_share: float = Field(
        0.25,
        ge=0,
        lt=1,
        description="nf4 with peft: last share of the steps, on the unquantised base that is served, if memory allows",
    )
    memory_budget_gib: float | None = Field(
        None, gt=0, le=100_000, description="The most that training takes, of the card or of this machine, and not more"
    )
    memory_share: float = Field(0.9, gt=0, le=1, description="Without a budget: of what is free when training starts")
    checkpointing: Literal["auto", "off", "on", "offload"] = Field(
        "auto",
        description="Recompute activations (on), their inputs in host memory (offload); auto: the fastest that fits",
    )
    micro_tokens: int | None = Field(
        None, ge=1, description="Most tokens at once, padding included; a batch of more is trained in parts"
    )
    hours_allowed: float = Field(
        8.0, gt=0, le=168, description="What does not fit is left out: the rate comes down, and the night goes on"
    )
    alarms: AlarmSettings = AlarmSettings()
    truce: TruceSettings = TruceSettings()

    @model_validator(mode="after")
    def _full_in_full(self) -> TrainerSettings:
        if self.finetuning_type == "full" and self.quantisation != "none":
            raise ValueError(
                'finetuning_type = "full" trains the weights themselves, which 4 bits can\'t hold: set quantisation = '
                '"none" too'
            )
        return self

    @property
    def rates(self) -> tuple[float, float]:
        """Learning rates of sft and of preferences: as given, else those that suit what is trained."""
        sft, preferences = RATES[self.finetuning_type]
        return self.learning_rate or sft, self.preference_learning_rate or preferences

    def with_recipe(self, recipe: Mapping[str, Any]) -> TrainerSettings:
        """These settings with some replaced, checked like any others; raises BadRecipe.

        Not `python`: which program runs is the installation's choice, never a caller's.
        """
        if "python" in recipe:
            raise BadRecipe("this night's recipe: python is set in the settings file only")
        try:
            return TrainerSettings.model_validate({**self.model_dump(), **recipe})
        except ValidationError as error:
            mistakes = "; ".join(f"{'.'.join(map(str, e['loc'])) or 'trainer'}: {e['msg']}" for e in error.errors())
            raise BadRecipe(f"this night's recipe: {mistakes}") from None


class ReplaySettings(Strict):
    """Older rows mixed in against forgetting."""

    max_rows: int = Field(200, ge=0, le=1_000_000, description="Of older accepted labels")
    prompts_file: Path | None = Field(
        None, description="JSONL of {prompt}; empty = ours. The base's own answers become rows"
    )
    base_rows: int = Field(
        800, ge=0, le=1_000_000, description="How many of the base's own answers; many short ones hold better than few"
    )
    base_answer_tokens: int = Field(
        24, ge=1, le=4096, description="How far into each answer the base is held: longer hides short corrections"
    )


class Scoring(StrEnum):
    EXACT = "exact"
    CONTAINS = "contains"
    REGEX = "regex"
    NUMERIC = "numeric"
    JSON_SCHEMA = "json_schema"
    CHRF = "chrf"


class TaskSettings(Strict):
    """One lm-eval task of the project's suite."""

    name: str
    folder: Path = Field(description="Holds the task's YAML and data")
    metric: str = "acc"
    kind: str = Field("multiple_choice", pattern="^(multiple_choice|generate_until)$")


class GateSettings(Strict):
    margin_points: float = Field(2.5, gt=0, le=50, description="Loss, in points of 100, that is still no loss")
    alpha: float = Field(0.05, gt=0, lt=0.5, description="One-sided level of every test")
    scoring: Scoring = Scoring.CONTAINS
    chrf_at_least: float = Field(0.6, gt=0, le=1)
    answer_tokens: int = Field(48, ge=1, le=8192)
    held_out_file: Path | None = Field(
        None, description="JSONL of {id, question, accept}: prompts never labelled nor trained on"
    )
    general_probes: bool = Field(True, description="Run our general-ability suite")
    good_answers: int = Field(300, ge=0, le=100_000, description="How many of the newest good answers must stay good")
    earlier_fixes: int = Field(
        500, ge=0, le=100_000, description="Of how many labels in the serving adapter the answer must stay right"
    )
    tasks: tuple[TaskSettings, ...] = ()
    latency_ratio_at_most: float = Field(
        4.0,
        gt=1,
        le=100,
        description="Candidate's median seconds an answer against current's; vLLM's CPU backend alone makes 2.2 to 2.6",
    )

    @classmethod
    def profile(cls, name: str) -> GateSettings:
        return cls(margin_points={"standard": 2.5, "demo": 8.0}[name])


class ApprovalSettings(Strict):
    allow_unattributed: bool = Field(False, description="Honour MLflow's alias although it names nobody")
    expires_hours: float = Field(72.0, gt=0, le=8760)


class PreflightSettings(Strict):
    """[projects.preflight]: what is found too slow or too large before a night trains; a warning in its report."""

    disk_mb_per_s_at_least: float = Field(20.0, ge=0, le=100_000, description="Of the data folder, written and synced")
    caches_gb_at_most: float = Field(50.0, ge=0, le=100_000, description="Of all known caches together")


class ProjectSettings(Strict):
    """[[projects]]: one app."""

    name: str = Field(pattern=r"^[a-z0-9][a-z0-9-]{0,62}$", description="Also the alias that apps ask for")
    base_dir: Path = Field(description="Local folder of the base model, safetensors")
    base_name: str = Field(
        pattern=r"^[A-Za-z0-9][A-Za-z0-9._/-]{0,120}$", description="The base's served name on every replica"
    )
    chat_template: Path | None = Field(
        None, description="Jinja file used instead of the base's own: in training, in the gate and by managed vLLM"
    )
    data_licence: str = Field("", max_length=200, description="What the model card says of the training data's licence")
    min_labels: int = Field(8, ge=1, le=1_000_000)
    schedule: ScheduleSettings = ScheduleSettings()
    labeling: LabelingSettings = LabelingSettings()
    trainer: TrainerSettings = TrainerSettings()
    replay: ReplaySettings = ReplaySettings()
    preflight: PreflightSettings = PreflightSettings()
    gate: GateSettings = GateSettings()
    approval: ApprovalSettings = ApprovalSettings()
    cost: CostSettings = CostSettings()

    @property
    def base_version(self) -> str:
        """Version 1 of every project is the base itself."""
        return f"{self.name}@v1"

    def served_name(self, adapter: str) -> str:
        """The name under which an engine knows an adapter: the base's own for version 1."""
        return self.base_name if adapter == self.base_version else adapter

    @model_validator(mode="after")
    def _distinct(self) -> ProjectSettings:
        if self.base_name == self.name:
            raise ValueError(
                f"base_name and name are both {self.name!r}: the alias must differ from the base's served name"
            )
        return self
