"""Which way of training is the fastest that fits: checkpointing off, on or offloaded, and how many tokens at once.

A recipe's batch stays what it is: where it does not fit, it is trained in micro-batches whose gradients add up to the
same step. Plans form a ladder, each rung with clearly less memory than the one above, for when one does not hold.
No torch; `service.commands.plan`, the preflight stage and the trainers use it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

from pydantic import Field

from labeling.settings import Strict
from loop.memory_estimate import Checkpointing, Estimate, Setup, Workload, estimate

# Measured on one H100 with Unsloth on an 8B Llama shape (docs/trainer.md): seconds a forward FLOP, backward included.
SECONDS_A_FLOP = 4.2e-15
RECOMPUTING = {"off": 1.0, "on": 1.36, "offload": 1.41}  # of the time without
BACKEND = {"unsloth": 1.0, "peft": 1.52}
DEQUANTISING = 4.9e-12  # seconds a parameter and micro-batch: forward and backward each unpack every matrix
CHANGING = 2e-11  # seconds a trained weight and micro-batch: base + change, gradients summed; counted in bytes
LAUNCHING = 5.8e-3  # seconds a layer and micro-batch that kernels take to start, however small they are
RUNG = 0.87  # the next plan down needs at most this share: less than the estimate's error would be no help
MODES: tuple[Checkpointing, ...] = ("off", "on", "offload")


class Plan(Strict):
    """One way to train. `estimated_bytes` is of one card, context included, or of the process on a CPU."""

    checkpointing: Checkpointing = "off"
    micro_tokens: int = Field(ge=1, description="Tokens at once, padding included; a longer row goes alone")
    micro_batches: int = Field(1, ge=1, description="Of the recipe's heaviest batch")
    estimated_bytes: int = Field(ge=0)
    host_bytes: int = Field(0, ge=0, description="Pinned memory beside the card, for offloading")
    budget_bytes: int = Field(ge=0)
    device: Literal["cuda", "cpu"]
    tokens_per_s: float = Field(ge=0, description="On an H100; only their order counts elsewhere")

    @property
    def fits(self) -> bool:
        return self.estimated_bytes <= self.budget_bytes


def plan_for(setup: Setup, batch: Workload, checkpointing: Checkpointing, micro_tokens: int, budget: int) -> Plan:
    """`batch`: the recipe's heaviest; `micro_tokens` of it at once."""
    micro = _part(batch, micro_tokens)
    needed = estimate(setup, micro, checkpointing)
    count = -(-batch.tokens // micro.tokens)
    usual = _part(micro, max(1, round(batch.usual * micro.tokens)))  # packed: no time goes into padding
    return Plan(
        checkpointing=checkpointing,
        micro_tokens=micro.tokens,
        micro_batches=count,
        estimated_bytes=needed.total,
        host_bytes=needed.host,
        budget_bytes=budget,
        device=setup.device,
        tokens_per_s=round(usual.tokens / seconds(setup, usual, checkpointing), 1),
    )


def itemised(setup: Setup, batch: Workload, plan: Plan) -> Estimate:
    return estimate(setup, _part(batch, plan.micro_tokens), plan.checkpointing)


def halves(batch: Workload, most: int | None = None) -> list[int]:
    """Tokens at once: the whole batch or `most`, a half, a quarter … and one row or pair."""
    sizes = [min(batch.tokens, max(most or batch.tokens, batch.least))]
    while sizes[-1] > batch.least:
        sizes.append(batch.half(sizes[-1]))
    return sizes


def plans_by_speed(
    setup: Setup, batch: Workload, budget: int, modes: Sequence[Checkpointing] = MODES, sizes: Sequence[int] = ()
) -> list[Plan]:
    """Every mode with every size; the fastest first. `sizes`: tokens at once; none: those of `halves`."""
    if setup.device == "cpu":
        modes = [mode for mode in modes if mode != "offload"] or ["on"]  # the memory that it would offload to
    found = [plan_for(setup, batch, mode, size, budget) for mode in modes for size in sizes or halves(batch)]
    return sorted(found, key=lambda plan: (-plan.tokens_per_s, plan.micro_batches, plan.estimated_bytes))


def ladder(plans: Sequence[Plan]) -> tuple[Plan, ...]:
    """The fastest that fits, then each time the fastest that needs clearly less; the leanest alone where none fits.

    `plans` are by speed.
    """
    rungs: list[Plan] = []
    below = float("inf")
    for plan in plans:
        if plan.fits and plan.estimated_bytes <= below:
            rungs.append(plan)
            below = RUNG * plan.estimated_bytes
    leanest = min(plans, key=lambda plan: plan.estimated_bytes)
    if not rungs or leanest.estimated_bytes < rungs[-1].estimated_bytes:
        rungs.append(leanest)
    return tuple(rungs)


def seconds(setup: Setup, micro: Workload, checkpointing: Checkpointing) -> float:
    """Of one micro-batch, forward and backward."""
    shape = setup.shape
    again = RECOMPUTING[checkpointing]
    attention = 2 * shape.layers * shape.query_width * micro.length  # causal: half the square
    head = 2 * shape.vocabulary * shape.hidden
    flops = micro.tokens * (2 * shape.linear_parameters + attention) + micro.scored * head
    computing = flops * SECONDS_A_FLOP * again * BACKEND[setup.backend] * _products(setup)
    passes = 1.0 if checkpointing == "off" else 1.5  # forward, backward and, recomputing, forward again
    launching = LAUNCHING * shape.layers * passes if setup.device == "cuda" else 0.0
    unpacking = DEQUANTISING * shape.linear_parameters * passes if setup.method == "qlora" else 0.0
    changing = CHANGING * setup.trained_parameters if setup.method == "full" else 0.0
    return max(computing, launching) + unpacking + changing


def _products(setup: Setup) -> float:
    """Matrix products, to an adapter's two (forward, and the input's gradient): a full fine-tune has the weight's
    gradient too, and in bfloat16 the change's own product."""
    if setup.method != "full":
        return 1.0
    return 2.0 if setup.compute_bytes == 2 else 1.5


def _part(batch: Workload, tokens: int) -> Workload:
    """Scored tokens in proportion."""
    tokens = min(tokens, batch.tokens)
    share = tokens / batch.tokens
    return replace(
        batch,
        tokens=tokens,
        length=min(batch.length, tokens),
        scored=round(batch.scored * share),
        replay_scored=round(batch.replay_scored * share),
    )
