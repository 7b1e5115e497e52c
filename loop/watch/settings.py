"""Settings of the watch over a training: alarms and their actions, the truce with production, what a night costs."""

from __future__ import annotations

from datetime import time
from typing import Literal

from pydantic import Field, model_validator

from labeling.settings import ServerUrl, Strict

# warn: said everywhere, nothing else. slow_down: the trainer works part of the time, until the alarm is over.
# roll_back: on from the last complete checkpoint before it, at a lower learning rate. restart: the same at the same
# rate. stop: the night fails with the reason, and can be resumed.
Nan = Literal["roll_back", "stop"]
OfLoss = Literal["off", "warn", "roll_back", "stop"]
OfMachine = Literal["off", "warn", "slow_down", "stop"]
OfProcess = Literal["off", "warn", "restart", "stop"]
OfDisk = Literal["off", "warn", "stop"]


class LossSpike(Strict):
    """Above the median of the last losses by so many robust deviations (1.4826 MAD), several steps in a row."""

    action: OfLoss = "roll_back"
    window_steps: int = Field(50, ge=10, le=10_000, description="Losses that the scale is taken from")
    deviations: float = Field(10, ge=3, le=1000, description="1.4826 MAD each: one standard deviation, where normal")
    steps: int = Field(3, ge=1, le=1000, description="In a row; one hard batch is no spike")


class NotANumber(Strict):
    """Loss or gradient NaN or infinite: the trainer itself ends then."""

    action: Nan = "roll_back"


class GradientNorm(Strict):
    action: OfLoss = "warn"
    times_clip: float = Field(5, ge=1, le=1000, description="Median of the window, before clipping, over max_grad_norm")
    window_steps: int = Field(50, ge=5, le=10_000)


class Throughput(Strict):
    """Tokens a second, against the best window of this run so far: a throttled or shared accelerator."""

    action: OfDisk = "warn"
    share: float = Field(0.6, gt=0, lt=1, description="Median of the window below this share of the best one's")
    window_steps: int = Field(20, ge=5, le=10_000)


class MemoryGrowth(Strict):
    """What the trainer holds between steps creeps up: a leak, which ends in running out of memory hours later."""

    action: OfProcess = "warn"
    growth: float = Field(0.3, ge=0.05, le=10, description="Above the first window's median, by this share")
    window_steps: int = Field(50, ge=5, le=10_000)


class Temperature(Strict):
    action: OfMachine = "slow_down"
    celsius: float = Field(85, ge=40, le=110, description="Above it; over once 5 degrees below it")
    seconds: float = Field(30, ge=0, le=3600)


class PowerCapped(Strict):
    """The driver holds the clock down because the card draws all that it may: normal at full load, slower still."""

    action: OfMachine = "warn"
    seconds: float = Field(300, ge=0, le=86_400)
    clock_share: float = Field(0.8, gt=0, le=1, description="Only while the clock is below this share of its highest")


class DiskFilling(Strict):
    action: OfDisk = "stop"
    free_gb: float = Field(2.0, gt=0, le=100_000, description="Less than this free under data_dir")


class NoProgress(Strict):
    """The parent's watchdog. Time that the trainer was paused by us does not count."""

    action: OfProcess = "restart"
    seconds: float = Field(900, ge=1, le=86_400, description="Since the last step, or 20 median steps if that is more")
    start_seconds: float = Field(3600, ge=1, le=86_400, description="Until the first step: loading a model takes long")


class AlarmSettings(Strict):
    """[projects.trainer.alarms]"""

    loss_spike: LossSpike = LossSpike()
    not_a_number: NotANumber = NotANumber()
    gradient_norm: GradientNorm = GradientNorm()
    throughput: Throughput = Throughput()
    memory_growth: MemoryGrowth = MemoryGrowth()
    temperature: Temperature = Temperature()
    power_capped: PowerCapped = PowerCapped()
    disk_filling: DiskFilling = DiskFilling()
    no_progress: NoProgress = NoProgress()
    max_roll_backs: int = Field(2, ge=0, le=100, description="Roll backs and restarts of one training; then it stops")
    rate_factor: float = Field(0.5, gt=0, lt=1, description="A roll back multiplies the learning rate by this")
    slow_down_share: float = Field(0.5, gt=0, lt=1, description="Of the time that a slowed trainer may work")
    sensor_seconds: float = Field(2.0, ge=0.05, le=60, description="Between two readings of the sensors")


class TruceSettings(Strict):
    """[projects.trainer.truce]: training on the GPU that also serves. Nothing of it is on unless set."""

    window_from: time | None = Field(None, description="Local time of the schedule's zone; trains only from here ...")
    window_to: time | None = Field(None, description="... to here, also over midnight; paused outside")
    memory_share: float | None = Field(None, gt=0, le=1, description="Of the GPU's memory, for the trainer")
    sleep: bool = Field(False, description="vLLM's sleep mode while it trains: replicas answer nothing then")
    latency_seconds: float | None = Field(None, gt=0, le=600, description="Objective: the quantile must stay below it")
    quantile: float = Field(0.95, gt=0, lt=1)
    metric: str = Field("vllm:time_to_first_token_seconds", pattern=r"^[a-zA-Z_:][a-zA-Z0-9_:]*$")
    metrics_url: ServerUrl = Field("", description="A /metrics, such as the gateway's; empty = every replica's")
    min_requests: int = Field(5, ge=1, le=1_000_000, description="Between two looks; fewer say nothing")
    poll_seconds: float = Field(5.0, ge=0.1, le=600)
    quiet_seconds: float = Field(60.0, ge=0, le=86_400, description="Kept so long, training goes on")
    when_broken: Literal["pause", "stop"] = Field(
        "pause", description="pause keeps the memory; stop gives it back, and training goes on from a checkpoint"
    )

    @model_validator(mode="after")
    def _whole_window(self) -> TruceSettings:
        if (self.window_from is None) != (self.window_to is None):
            raise ValueError("window_from and window_to belong together")
        if self.window_from is not None and self.window_from == self.window_to:
            raise ValueError("window_from and window_to are the same time: leave both out to train at any hour")
        return self


class CostSettings(Strict):
    """[projects.cost]: rates that turn hours and energy into money. Without one, a report names no money."""

    currency: str = Field("EUR", pattern=r"^[A-Z]{3}$")
    gpu_hour: float | None = Field(None, ge=0, le=100_000)
    kwh: float | None = Field(None, ge=0, le=1000)
