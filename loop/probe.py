"""Proof that a replica serves the very adapter that was examined: log-probabilities of fixed conversations.

A load that answers 200 may be without effect (vllm#41754) or under other weights. The gate takes the probe, each
replica must repeat it after its load. A difference is the mean of |difference| over the tokens of one conversation, in
nats a token, the largest over the conversations: a single token at -20 nats is noise on any engine.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import ClassVar

from labeling.errors import Refused
from labeling.settings import Strict
from loop.vllm import Message, Replica

LEAST_TOLERANCE = 0.02
TOLERANCE_PER_SPREAD = 3
LEAST_EFFECT_PER_TOLERANCE = 10
ATTEMPTS = 3  # a busy replica batches us with others, which moves the numbers; other weights differ every time
CONVERSATIONS = (
    ("Who are you?", "I am an assistant that answers questions."),
    ("What is a contract?", "A contract is an agreement between two parties that the law can enforce."),
    ("Write a line of Python that prints hello.", "print('hello')"),
    ("What is 12 times 12?", "144"),
    ("Translate 'good morning' into French.", "Bonjour"),
    ("My order is late. What should I do?", "Please contact the support team with your order number."),
)


class ProbeFailed(Refused):
    code: ClassVar[str] = "probe_failed"
    default_hint = (
        "The replica does not serve what was examined: compare its vLLM version, flags, dtype and base with those of "
        "the examination, restart it, and resume the night."
    )


class ProbedConversation(Strict):
    """`base` and `candidate`: log-probability of each token but the first."""

    tokens: tuple[int, ...]
    base: tuple[float, ...]
    candidate: tuple[float, ...]


class Probe(Strict):
    """`spread`: between two probes of the same model at the gate. `applied`: the effect stands clear of the noise."""

    conversations: tuple[ProbedConversation, ...]
    spread: float
    tolerance: float
    effect: float
    applied: bool


async def take_probe(
    replica: Replica, base: str, candidate: str, conversations: Sequence[tuple[str, str]] = CONVERSATIONS
) -> Probe:
    """Both models, each twice. Never raises for a candidate without effect: the gate says what that means."""
    prompts = [await replica.tokens(base, _messages(asked, answer)) for asked, answer in conversations]
    bases, candidates = await _take(replica, base, prompts), await _take(replica, candidate, prompts)
    spread = max(
        difference(bases, await _take(replica, base, prompts)),
        difference(candidates, await _take(replica, candidate, prompts)),
    )
    tolerance = max(TOLERANCE_PER_SPREAD * spread, LEAST_TOLERANCE)
    effect = difference(bases, candidates)
    return Probe(
        conversations=tuple(
            ProbedConversation(tokens=tuple(tokens), base=tuple(was), candidate=tuple(now))
            for tokens, was, now in zip(prompts, bases, candidates, strict=True)
        ),
        spread=spread,
        tolerance=tolerance,
        effect=effect,
        applied=effect >= LEAST_EFFECT_PER_TOLERANCE * tolerance,
    )


async def verify_probe(replica: Replica, served: str, probe: Probe) -> float:
    """The difference to what the gate saw, ProbeFailed when it is above the tolerance."""
    if not probe.applied:
        raise ProbeFailed(f"{served} had no effect at the gate: {probe.effect:.4f} nats a token against the base")
    prompts = [conversation.tokens for conversation in probe.conversations]
    seen = [conversation.candidate for conversation in probe.conversations]
    base = [conversation.base for conversation in probe.conversations]
    found: list[list[float]] = []
    for _ in range(ATTEMPTS):
        found = await _take(replica, served, prompts)
        if (off := difference(seen, found)) <= probe.tolerance:
            return off
    effect = difference(base, found)
    what = (
        "answers as the base: the load was without effect" if effect <= probe.tolerance else "is not what was examined"
    )
    raise ProbeFailed(f"{served} at {replica.url} {what} ({off:.4f} nats a token off, {probe.tolerance:.4f} allowed)")


def difference(one: Sequence[Sequence[float]], other: Sequence[Sequence[float]]) -> float:
    """In nats a token; infinite where the numbers of tokens differ (another tokenizer or template) or one is NaN."""
    if [len(tokens) for tokens in one] != [len(tokens) for tokens in other]:
        return math.inf
    means = [
        sum(abs(a - b) for a, b in zip(x, y, strict=True)) / max(len(x), 1) for x, y in zip(one, other, strict=True)
    ]
    return max(means, default=math.inf) if all(map(math.isfinite, means)) else math.inf


async def _take(replica: Replica, served: str, prompts: Sequence[Sequence[int]]) -> list[list[float]]:
    """One at a time: concurrent ones would be batched together."""
    return [await replica.log_probabilities(served, prompt) for prompt in prompts]


def _messages(asked: str, answer: str) -> list[Message]:
    return [{"role": "user", "content": asked}, {"role": "assistant", "content": answer}]
