"""Alarms of what the trainer tells after each step: loss, gradient norm, tokens a second, memory.

Losses are judged against a median and its absolute deviation, which a spike itself does not move.
"""

from __future__ import annotations

from collections import deque
from statistics import median

from loop.watch.samples import Finding, Sample, Work
from loop.watch.settings import GradientNorm, LossSpike, MemoryGrowth, Throughput

NORMAL = 1.4826  # MAD x this is the standard deviation of a normal distribution
RECOVERED = 0.1  # of the best speed above the limit until a slow run counts as quick again: no flapping
LEAST_SHARE, LEAST = 0.05, 0.01  # a loss that hardly moves has almost no MAD: its least scale, relative and in nats


class LossSpikes:
    kind = "loss_spike"
    hint = "Lower trainer.learning_rate; broken or contradictory labels of this night do it, too."

    def __init__(self, settings: LossSpike) -> None:
        self._settings = settings
        self._calm: deque[float] = deque(maxlen=settings.window_steps)
        self._high: list[tuple[int, float]] = []
        self._objective: str | None = None

    def look(self, sample: Sample) -> Finding | None:
        if sample.loss is None or sample.step is None:
            return self._finding()
        if sample.objective != self._objective:
            self._calm.clear()
            self._high.clear()
            self._objective = sample.objective
        if len(self._calm) >= self._settings.window_steps // 2 and sample.loss > self._limit():
            self._high.append((sample.step, sample.loss))
        else:
            self._high.clear()
            self._calm.append(sample.loss)
        return self._finding()

    def _limit(self) -> float:
        centre = median(self._calm)
        spread = NORMAL * median(abs(loss - centre) for loss in self._calm)
        return centre + self._settings.deviations * max(spread, LEAST_SHARE * abs(centre), LEAST)

    def _finding(self) -> Finding | None:
        if len(self._high) < self._settings.steps:
            return None
        (first, _), (_, loss) = self._high[0], self._high[-1]
        message = (
            f"loss {loss:.3g} for {len(self._high)} steps, above {self._limit():.3g}; before: {median(self._calm):.3g}"
        )
        return Finding(message=message, onset_step=first - 1)


class GradientNorms:
    kind = "gradient_norm"
    hint = "Lower trainer.learning_rate or raise trainer.warmup_share: every step is cut to its direction only."

    def __init__(self, settings: GradientNorm, clip: float) -> None:
        self._limit = settings.times_clip * clip
        self._seen: deque[tuple[int, float]] = deque(maxlen=settings.window_steps)
        self._objective: str | None = None
        self._now: Finding | None = None

    def look(self, sample: Sample) -> Finding | None:
        if sample.grad_norm is None or sample.step is None:
            return self._now
        if sample.objective != self._objective:
            self._seen.clear()
            self._objective = sample.objective
        self._seen.append((sample.step, sample.grad_norm))
        middle = median(norm for _, norm in self._seen)
        full = len(self._seen) == self._seen.maxlen
        message = f"gradient norm {middle:.3g} over the last {len(self._seen)} steps, above {self._limit:.3g}"
        first = self._seen[0][0] - 1
        self._now = Finding(message=message, onset_step=first) if full and middle > self._limit else None
        return self._now


class SlowTokens:
    kind = "throughput"
    hint = "Another process on the GPU or the machine, heat, or a power cap: look at temperature, power and load."

    def __init__(self, settings: Throughput) -> None:
        self._share = settings.share
        self._seen: deque[float] = deque(maxlen=settings.window_steps)
        self._best = 0.0
        self._work: Work = (None, False)
        self._now: Finding | None = None

    def look(self, sample: Sample) -> Finding | None:
        if sample.tokens_per_s is None or sample.step is None or sample.paused:
            return self._now
        if sample.work != self._work:
            self._seen.clear()
            self._best, self._work = 0.0, sample.work
        self._seen.append(sample.tokens_per_s)
        if len(self._seen) < (self._seen.maxlen or 0):
            return self._now
        middle = median(self._seen)
        self._best = max(self._best, middle)
        message = f"{middle:,.0f} tokens/s, {middle / self._best:.0%} of this run's best ({self._best:,.0f})"
        limit = self._share + (RECOVERED if self._now else 0.0)
        self._now = Finding(message=message) if middle < limit * self._best else None
        return self._now


class GrowingMemory:
    kind = "memory_growth"
    hint = 'A leak in the trainer\'s environment; set alarms.memory_growth.action = "restart" to live with it.'

    def __init__(self, settings: MemoryGrowth) -> None:
        self._growth = settings.growth
        self._first: list[float] = []
        self._seen: deque[float] = deque(maxlen=settings.window_steps)
        self._work: Work = (None, False)
        self._now: Finding | None = None

    def look(self, sample: Sample) -> Finding | None:
        if not sample.memory_bytes or sample.step is None:
            return self._now
        if sample.work != self._work:
            self._first.clear()
            self._seen.clear()
            self._work = sample.work
        if len(self._first) < (self._seen.maxlen or 0):
            self._first.append(sample.memory_bytes)
            return self._now
        self._seen.append(sample.memory_bytes)
        before, middle = median(self._first), median(self._seen)
        full = len(self._seen) == self._seen.maxlen
        message = f"{middle / 1e9:.2f} GB between steps, {before / 1e9:.2f} GB at first"
        self._now = Finding(message=message) if full and middle > (1 + self._growth) * before else None
        return self._now
