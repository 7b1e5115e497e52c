"""The description of a version in MLflow: what an approver must see before moving the alias. Short markdown."""

from __future__ import annotations

from loop.report import WORDS, NightFacts, family_table


def model_card(facts: NightFacts, evidence_hash: str) -> str:
    verdict, delta = facts.verdict, facts.delta
    regressions = sum(len(rows) for rows in facts.regressions.values())
    lines = [
        f"**{WORDS[verdict.state]}** (night {facts.date}): {verdict.reason}.",
        "",
        family_table(verdict) if verdict.families else "No numbers: nothing was judged.",
        "",
        f"{regressions} regressions. Compared with `{facts.evaluated.current}`; margin {facts.gate.margin_points:g} "
        "points.",
        f"Trained on {delta.label_rows} new labels, {delta.replay_rows} older ones and {delta.base_rows} of the base's "
        f"own answers, by {delta.method} from {facts.start}; labelled by {len(facts.labellers)} people.",
        "",
        _how(facts),
        f"Evidence `{evidence_hash}`, night `{facts.night_id}`.",
    ]
    return "\n".join(lines)


def _how(facts: NightFacts) -> str:
    if not facts.verdict.passed:
        return f"Not for production. {facts.verdict.hint}"
    return "To approve, move the alias `production` onto this version; to roll back later, move it back."
