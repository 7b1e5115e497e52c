"""A night's report for the on-call: the decision first, then why, then the numbers it rests on. Markdown and JSON."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from loop.gate import GateVerdict, flagged
from loop.gate_families import EARLIER, FLAGGED, POOL, FamilyVerdict
from loop.outputs import Delta, Evaluated, Preflight, Registered
from loop.settings import GateSettings
from loop.tables import NightState
from loop.watch.told import cost_lines, training_lines

REGRESSIONS_SHOWN = 20
TEXT_SHOWN = 160
TRAINING = ("time_limited", "steps", "planned_steps", "rate_scale", "roll_backs", "restarts", "alarms", "notes")
WORDS = {
    NightState.AWAITING_APPROVAL: "passed the gate, awaiting approval",
    NightState.REJECTED: "REJECTED",
    NightState.INCONCLUSIVE: "INCONCLUSIVE",
}


@dataclass(frozen=True)
class NightFacts:
    """All that a report tells; `regressions` by family, each {id, prompt, current, candidate, answers}."""

    project: str
    night_id: str
    date: str
    verdict: GateVerdict
    gate: GateSettings
    delta: Delta
    registered: Registered
    evaluated: Evaluated
    adapter_digest: str
    base_digest: str
    regressions: Mapping[str, Sequence[dict[str, Any]]]
    labellers: Mapping[str, int]
    cost: Mapping[str, Any]
    preflight: Preflight
    recipe: Mapping[str, str]
    licences: Mapping[str, str]  # of base and data; empty where nothing names one
    training: Mapping[str, Any] = field(default_factory=dict)  # the trainer's result, and what the watch saw of it

    @property
    def start(self) -> str:
        """The adapter that the training went on from, or "base"."""
        return str(self.training.get("start", "base"))

    @property
    def final_margin(self) -> float | None:
        """Nats, chosen above rejected, at the end of dpo or orpo."""
        return self.training.get("final_margin")


def summary(facts: NightFacts) -> dict[str, Any]:
    """The report as JSON: kept as evidence and told by `night show --json`."""
    verdict = facts.verdict
    return {
        "decision": WORDS[verdict.state],
        "reason": verdict.reason,
        "hint": verdict.hint,
        "findings": [{"rule": f.rule, "state": f.state.value, "reason": f.reason} for f in verdict.findings],
        "notes": [*verdict.notes, *facts.delta.notes],
        "margin_points": facts.gate.margin_points,
        "alpha": facts.gate.alpha,
        "families": [_line_json(line) for line in verdict.families],
        "fix_rate": {line.name: _rate(line) for line in flagged(verdict.families)},
        "general": general(facts.evaluated),
        "regressions": sum(len(rows) for rows in facts.regressions.values()),
        "regressions_by_family": {name: [row["id"] for row in rows] for name, rows in facts.regressions.items()},
        "applied": facts.evaluated.applied,
        "seconds_an_answer": facts.evaluated.seconds_an_answer,
        "method": facts.delta.method,
        "method_why": facts.delta.method_why,
        "start": facts.start,
        "pairs": facts.delta.pairs,
        "thumbs": {"good": facts.delta.good_thumbs, "bad": facts.delta.bad_thumbs},
        "labels": facts.delta.label_rows,
        "labellers": dict(facts.labellers),
        "examples": facts.delta.label_rows + facts.delta.replay_rows + facts.delta.base_rows,
        "adapter": facts.registered.adapter,
        "adapter_digest": facts.adapter_digest,
        "mlflow_version": str(facts.registered.version),
        "cost": dict(facts.cost),
        "template_digest": facts.preflight.template_digest,
        "environment": facts.preflight.environment,
        "warnings": list(facts.preflight.warnings),
        "recipe": dict(facts.recipe),
        "licences": dict(facts.licences),
        "training": {key: facts.training[key] for key in TRAINING if key in facts.training},
    }


def general(evaluated: Evaluated) -> dict[str, float | int]:
    """All that the base was not corrected in, taken together."""
    others = [family for family in evaluated.families if family.name not in (*FLAGGED, EARLIER)]
    n = sum(family.n for family in others)
    means = {
        model: sum(getattr(family, model) * family.n for family in others) / n if n else 0.0
        for model in ("base", "current", "candidate")
    }
    return {**means, "n": n}


def report(facts: NightFacts) -> str:
    """Markdown, decision first."""
    sections = [
        _head(facts),
        _table(facts),
        _regressions(facts),
        _training(facts),
        _preflight(facts),
        _cost(facts),
        _identity(facts),
    ]
    return "\n\n".join(section for section in sections if section) + "\n"


def family_table(verdict: GateVerdict) -> str:
    """Before and after, a family a line; also the model card's."""
    head = "| family | n | base | current | candidate | newly right | newly wrong | p (loss) | loss at most |"
    rule = "|---|--:|--:|--:|--:|--:|--:|--:|--:|"
    return "\n".join([head, rule, *[_table_line(line) for line in verdict.families]])


def _head(facts: NightFacts) -> str:
    verdict = facts.verdict
    others = [f"- also: {finding.reason}" for finding in verdict.findings[1:]]
    notes = [f"- note: {note}" for note in verdict.notes]
    notes += [f"- before training: {warning}" for warning in facts.preflight.warnings]
    lines = [
        f"# {facts.registered.adapter}: {WORDS[verdict.state]}",
        "",
        f"Night {facts.date} of project `{facts.project}`.",
        "",
        f"**Why**: {verdict.reason}.",
        "",
        *others,
        *notes,
        *([""] if others or notes else []),
        f"**What to do**: {_next_step(facts)}",
    ]
    return "\n".join(lines)


def _next_step(facts: NightFacts) -> str:
    if not facts.verdict.passed:
        return facts.verdict.hint
    version = facts.registered.version
    return (
        f"Approve it by moving MLflow's alias `production` of `{facts.project}` onto version {version} "
        f"(or `nightschool approve {facts.night_id}`), or `nightschool refuse {facts.night_id} --why ...`."
    )


def _table(facts: NightFacts) -> str:
    if not facts.verdict.families:
        return "No numbers: nothing was judged."
    gate = facts.gate
    text = (
        f"## Before and after\n\n{family_table(facts.verdict)}\n\n"
        f"Margin {gate.margin_points:g} points, one-sided level {gate.alpha:g}. `p (loss)` is exact McNemar of "
        "candidate against current, item by item, after Holm. `loss at most` is the upper bound of the loss in points "
        "of 100; in brackets: not judged alone, but in the line `pool`."
    )
    seconds = facts.evaluated.seconds_an_answer
    times = ", ".join(f"{role} {value:.2f} s" for role, value in seconds.items())
    return f"{text}\n\nMedian time of an answer: {times or 'not measured'}."


def _table_line(line: FamilyVerdict) -> str:
    bound = f"{100 * line.loss_bound:.1f}"
    cells = [
        "**pool**" if line.name == POOL else line.name,
        str(line.n),
        *[f"{100 * score:.1f} %" for score in (line.base, line.current, line.candidate)],
        str(line.won),
        str(line.lost),
        f"{line.p_loss_holm:.2g}",
        f"({bound})" if line.bound_by == "pool" else bound,
    ]
    return f"| {' | '.join(cells)} |"


def _regressions(facts: NightFacts) -> str:
    count = sum(len(rows) for rows in facts.regressions.values())
    if count == 0:
        return "## Regressions\n\nNone: nothing that is right now was answered wrong."
    lines = [f"## Regressions ({count})"]
    left = REGRESSIONS_SHOWN
    for name, rows in facts.regressions.items():
        if not rows or left <= 0:
            continue
        lines += ["", f"### {name} ({len(rows)})", "", "| prompt | now | candidate |", "|---|---|---|"]
        lines += [
            f"| {_cell(row['prompt'])} | {_cell(row['answers']['current'])} | {_cell(row['answers']['candidate'])} |"
            for row in rows[:left]
        ]
        left -= len(rows)
    if count > REGRESSIONS_SHOWN:
        lines += ["", f"{REGRESSIONS_SHOWN} of {count} shown; the evaluate stage's files have all."]
    return "\n".join(lines)


def _training(facts: NightFacts) -> str:
    delta = facts.delta
    people = ", ".join(f"{name} {count}" for name, count in sorted(facts.labellers.items())) or "nobody recorded"
    lines = [
        "## What was trained",
        "",
        f"- {delta.label_rows} new labels, {delta.replay_rows} older ones again, {delta.base_rows} of the base's own "
        f"answers; {delta.held_out_items} labels held out of training",
        *_method(facts),
        f"- labels by annotator: {people}",
        *[f"- {note}" for note in delta.notes],
        *[f"- {line}" for line in training_lines(facts.training)],
    ]
    return "\n".join(lines)


def _preflight(facts: NightFacts) -> str:
    """Every check that was looked at; what needs mending stands at the top already."""
    return "\n".join(["## Looked at before training", "", *[f"- {check}" for check in facts.preflight.checks]])


def _method(facts: NightFacts) -> list[str]:
    delta = facts.delta
    why = f" ({delta.method_why})" if delta.method_why else ""
    lines = [f"- method `{delta.method}`{why}, from {facts.start}"]
    if delta.pairs:
        margin = (
            "" if facts.final_margin is None else f"; at the end the better one lay {facts.final_margin:.1f} nats above"
        )
        lines.append(f"- {delta.pairs} pairs of a better and a worse answer{margin}")
    if delta.good_thumbs or delta.bad_thumbs:
        lines.append(
            f"- {delta.good_thumbs} thumbs up and {delta.bad_thumbs} down; of those below, right means in this exam "
            "that the answer is another one: nobody wrote a better one"
        )
    return lines


def _cost(facts: NightFacts) -> str:
    cost = facts.cost
    stages = ", ".join(f"{stage} {seconds:g} s" for stage, seconds in cost["stage_seconds"].items())
    memory = cost.get("peak_memory_bytes")
    extra = f"; training peaked at {memory / 1e9:.1f} GB" if memory else ""
    plan = f" Memory: {cost['memory']}." if cost.get("memory") else ""
    first = f"{cost['seconds']:g} s in all ({stages}){extra}.{plan}"
    return "\n".join(["## Cost", "", first, *cost_lines(cost)])


def _identity(facts: NightFacts) -> str:
    evaluated = facts.evaluated
    return "\n".join(
        [
            "## What this rests on",
            "",
            "| what | digest |",
            "|---|---|",
            f"| adapter {facts.registered.adapter} | `{facts.adapter_digest}` |",
            f"| compared with {evaluated.current} | `{evaluated.current_digest}` |",
            f"| base | `{facts.base_digest}` |",
            f"| chat template | `{facts.preflight.template_digest or 'not recorded'}` |",
            f"| training data | `{facts.delta.digest}` |",
            f"| exam | `{evaluated.tasks_digest}` |",
        ]
    )


def _cell(text: str) -> str:
    return one_line(text) or "*(empty)*"


def one_line(text: str) -> str:
    """Whatever a model or a user wrote, as text that fits into a line of a table."""
    plain = " ".join(text.split())
    short = plain if len(plain) <= TEXT_SHOWN else f"{plain[:TEXT_SHOWN]}…"
    return short.replace("\\", "\\\\").replace("|", "\\|").replace("`", "'").replace("<", "&lt;")


def _line_json(line: FamilyVerdict) -> dict[str, Any]:
    return {
        "name": line.name,
        "n": line.n,
        "base": line.base,
        "current": line.current,
        "candidate": line.candidate,
        "lost": line.lost,
        "won": line.won,
        "p_loss": line.p_loss,
        "p_loss_holm": line.p_loss_holm,
        "p_gain": line.p_gain,
        "loss_bound_points": 100 * line.loss_bound,
        "bound_by": line.bound_by,
        "needed": line.needed,
    }


def _rate(line: FamilyVerdict) -> dict[str, float | int]:
    return {"before": line.current, "after": line.candidate, "n": line.n}
