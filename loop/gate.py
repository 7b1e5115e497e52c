"""The decision of a night, from paired scores alone: a pure function, rule by rule. docs/gate.md tells the on-call.

Every doubt closes the gate: what is missing, doubled, cut short or not a number is no evidence.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from loop import gate_statistics as statistics
from loop.gate_families import EARLIER, FLAGGED, MODELS, POOL, Family, FamilyVerdict, examine, is_open
from loop.settings import GateSettings
from loop.tables import NightState


@dataclass(frozen=True)
class Finding:
    """One rule that did not hold."""

    rule: str
    state: NightState
    reason: str


@dataclass(frozen=True)
class GateVerdict:
    """`state` is REJECTED, INCONCLUSIVE, or awaiting_approval when passed; `findings[0]` gave the reason."""

    state: NightState
    reason: str
    hint: str
    families: tuple[FamilyVerdict, ...]
    findings: tuple[Finding, ...]
    notes: tuple[str, ...] = ()

    @property
    def passed(self) -> bool:
        return self.state is NightState.AWAITING_APPROVAL


HINTS = {
    "evidence": "Resume the night; if it comes back, look at the evaluate stage's files and at vLLM's log.",
    "nothing kept": "Rate good answers good through feedback, switch gate.general_probes on, or add gate.tasks.",
    "silent": "The adapter answers nothing at all: look at the training loss and at the labels' corrections.",
    "not applied": "vLLM loads an adapter without effect when module names do not match, and a training that learned "
    "nothing leaves one: compare target_modules with the base, and look at the training loss.",
    "no effect": "Nothing was learned: look at the training loss, the learning rate, the epochs and the labels.",
    "loss": "Read the regressions. More replay, fewer epochs or a lower learning rate keep what was known; wrong "
    "labels show here too: this night's labels are held back until a person confirms them. An earlier label whose "
    "truth has changed is withdrawn, or labelled anew.",
    "no gain": "The labelled answers did not come through: look at the training loss, the epochs and the labels.",
    "no held-out gain": "Learned by heart, or labels that contradict the held-out ones: label more phrasings.",
    "latency": "Look at the answers' lengths and the rank, or raise latency_ratio_at_most.",
    "margin": "Rate more good answers, add tasks, or accept a wider margin_points.",
    "gain open": "Label more items.",
}


def decide(
    families: Sequence[Family],
    expected: Mapping[str, int | None],
    *,
    applied: bool | None,
    seconds_an_answer: Mapping[str, float],
    settings: GateSettings,
) -> GateVerdict:
    """`expected` names every family that must be there, with its number of items where that is known.

    An adapter without effect need not be examined: that finding stands without families.
    """
    if applied is False and not families:
        return _verdict((), _not_applied(applied), ())
    broken = [*_evidence(families, expected, applied), *_nothing_kept(families)]
    if broken:
        return _verdict((), broken, ())
    table = tuple(examine(families, settings))
    findings = (
        *_silent(families),
        *_not_applied(applied),
        *_no_effect(families),
        *losses(table, settings),
        *_gains(table, settings),
        *_latency(seconds_an_answer, settings),
        *open_bounds(table, settings),
    )
    return _verdict(table, findings, _notes(table, settings))


def _verdict(table: tuple[FamilyVerdict, ...], findings: Sequence[Finding], notes: tuple[str, ...]) -> GateVerdict:
    """The first REJECTED finding decides; else the first INCONCLUSIVE one; none: passed."""
    for state in (NightState.REJECTED, NightState.INCONCLUSIVE):
        first = next((finding for finding in findings if finding.state is state), None)
        if first is not None:
            ordered = (first, *[finding for finding in findings if finding is not first])
            return GateVerdict(state, first.reason, HINTS[first.rule], table, ordered, notes)
    gains = "; ".join(f"{x.name} {_percent(x.current)} -> {_percent(x.candidate)} of {x.n}" for x in flagged(table))
    reason = f"the flagged prompts improved ({gains}) and no family lost more than the margin"
    return GateVerdict(NightState.AWAITING_APPROVAL, reason, "Approve it, or refuse it.", table, (), notes)


def flagged(table: Sequence[FamilyVerdict]) -> list[FamilyVerdict]:
    return [line for line in table if line.name in FLAGGED]


# Is the evidence whole? --------------------------------------------------------------------------------------------


def _evidence(families: Sequence[Family], expected: Mapping[str, int | None], applied: bool | None) -> list[Finding]:
    problems = [*_missing(families, expected), *(problem for family in families for problem in _unsound(family))]
    if applied is None:
        problems.append("nobody measured whether the adapter has an effect")
    return [_incomplete(problem) for problem in problems]


def _nothing_kept(families: Sequence[Family]) -> list[Finding]:
    if any(family.name not in (*FLAGGED, EARLIER) for family in families):
        return []
    reason = "nothing examines what must stay as it is: no good answers, no general probes, no tasks"
    return [Finding("nothing kept", NightState.INCONCLUSIVE, reason)]


def _incomplete(problem: str) -> Finding:
    return Finding("evidence", NightState.INCONCLUSIVE, f"the evidence is incomplete: {problem}")


def _missing(families: Sequence[Family], expected: Mapping[str, int | None]) -> list[str]:
    there = Counter(family.name for family in families)
    problems = [f"family {name} is missing" for name in {"trained": None, **expected} if name not in there]
    problems += [f"family {name} is there {count} times" for name, count in there.items() if count > 1]
    for family in families:
        wanted = expected.get(family.name)
        if wanted is not None and family.n != wanted:
            problems.append(f"family {family.name} has {family.n} items instead of {wanted}")
    return problems


def _unsound(family: Family) -> list[str]:
    if not family.items:
        return [f"family {family.name} has no items"]
    if len({item.id for item in family.items}) != family.n:
        return [f"family {family.name} has an item twice"]
    for item in family.items:
        for model in MODELS:
            value = getattr(item, model)
            if not 0 <= value <= 1:  # NaN included
                return [f"family {family.name}, item {item.id}: the score of {model} is {value}"]
    return [
        f"family {family.name}: {model} gave only empty answers, so the engine was ill"
        for model in family.silent
        if model != "candidate"
    ]


# Rules that reject -------------------------------------------------------------------------------------------------


def _silent(families: Sequence[Family]) -> list[Finding]:
    names = [family.name for family in families if "candidate" in family.silent]
    if not names:
        return []
    return [Finding("silent", NightState.REJECTED, f"the candidate gave only empty answers in {', '.join(names)}")]


def _not_applied(applied: bool | None) -> list[Finding]:
    if applied:
        return []
    reason = "not applied: the candidate's log-probabilities are the base's own, within the noise"
    return [Finding("not applied", NightState.REJECTED, reason)]


def _no_effect(families: Sequence[Family]) -> list[Finding]:
    """After a training, not one flagged prompt scored otherwise than with the base: no result, but a fault."""
    prompts = [item for family in families if family.name in FLAGGED for item in family.items]
    if any(item.candidate != item.base for item in prompts):
        return []
    reason = f"+0 % against base on {len(prompts)} flagged prompts: something went wrong"
    return [Finding("no effect", NightState.REJECTED, reason)]


def losses(table: Sequence[FamilyVerdict], settings: GateSettings) -> list[Finding]:
    """The significant ones, the clearest first."""
    return [
        Finding("loss", NightState.REJECTED, _loss_text(line))
        for line in sorted(table, key=lambda line: (line.p_loss_holm, line.name == POOL))
        if line.p_loss_holm <= settings.alpha
    ]


def _loss_text(line: FamilyVerdict) -> str:
    where = "over the pooled families" if line.name == POOL else f"in {line.name}"
    return (
        f"significant loss {where}: {_percent(line.current)} -> {_percent(line.candidate)} of {line.n} "
        f"({line.lost} newly wrong, {line.won} newly right; p = {line.p_loss_holm:.2g} after Holm)"
    )


def _latency(seconds: Mapping[str, float], settings: GateSettings) -> list[Finding]:
    current, candidate = seconds.get("current", math.nan), seconds.get("candidate", math.nan)
    if not (0 < current < math.inf and 0 < candidate < math.inf):
        return [_incomplete("no time an answer was measured")]
    ratio = candidate / current
    if ratio <= settings.latency_ratio_at_most:
        return []
    reason = (
        f"latency: an answer takes {candidate:.2f} s instead of {current:.2f} s, {ratio:.1f} times as long; "
        f"at most {settings.latency_ratio_at_most:g} times is allowed"
    )
    return [Finding("latency", NightState.REJECTED, reason)]


# Gain on the flagged prompts ---------------------------------------------------------------------------------------


def _gains(table: Sequence[FamilyVerdict], settings: GateSettings) -> list[Finding]:
    """The trained prompts must gain. So must the held-out ones, where enough of them are wrong now to show it."""
    findings: list[Finding] = []
    for line in flagged(table):
        if line.name == "trained":
            findings += _gain(line, settings, "no gain", "no gain on the flagged prompts")
        elif not _too_few_to_gain(line, settings.alpha):
            findings += _gain(line, settings, "no held-out gain", "no gain on the held-out prompts")
    return findings


def _gain(line: FamilyVerdict, settings: GateSettings, rule: str, words: str) -> list[Finding]:
    if line.p_gain <= settings.alpha:
        return []
    counts = f"{line.won} newly right, {line.lost} newly wrong of {line.n}"
    if line.candidate <= line.current:
        return [Finding(rule, NightState.REJECTED, f"{words}: {counts}")]
    total = statistics.items_for_significance(line.won, line.lost, line.n, settings.alpha)
    more = _about(None if total is None else max(1, total - line.n))
    reason = f"the gain in {line.name} may be chance ({counts}; p = {line.p_gain:.2g}): {more}"
    return [Finding("gain open", NightState.INCONCLUSIVE, reason)]


def _too_few_to_gain(line: FamilyVerdict, alpha: float) -> bool:
    """Wins without any loss are significant from log2(1/alpha) on: 5 at 5 %."""
    return round(line.n * (1 - line.current)) < math.ceil(-math.log2(alpha))


def _notes(table: Sequence[FamilyVerdict], settings: GateSettings) -> tuple[str, ...]:
    held_out = next((line for line in table if line.name == "held_out"), None)
    if held_out is None:
        return ("no held-out prompts: whether the fix reaches other phrasings was not examined",)
    if _too_few_to_gain(held_out, settings.alpha):
        return ("held_out: too few are wrong now to show a gain; it counts among what must not be lost",)
    return ()


# Bounds on the loss ------------------------------------------------------------------------------------------------


def open_bounds(table: Sequence[FamilyVerdict], settings: GateSettings) -> list[Finding]:
    """Of the families that are not seen to have lost already."""
    return [
        Finding("margin", NightState.INCONCLUSIVE, _open_text(line, settings))
        for line in table
        if is_open(line, settings) and line.p_loss_holm > settings.alpha
    ]


def _open_text(line: FamilyVerdict, settings: GateSettings) -> str:
    where = "over the pooled families" if line.name == POOL else f"in {line.name}"
    return (
        f"the loss {where} may be up to {100 * line.loss_bound:.1f} points with n = {line.n}, and the margin is "
        f"{settings.margin_points:g}: {_about(line.needed)}"
    )


def _about(more: int | None) -> str:
    if more is None:
        return "at the rates seen, no number of items would decide it"
    return f"about {more} more {'item decides' if more == 1 else 'items decide'} it"


def _percent(fraction: float) -> str:
    return f"{100 * fraction:.0f} %"
