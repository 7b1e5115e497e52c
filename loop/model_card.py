"""The description of a version in MLflow: what an approver must see before moving the alias, and who did. Markdown."""

from __future__ import annotations

from loop.report import WORDS, NightFacts, family_table, one_line
from loop.tables import Promotion
from loop.watch.told import extraction_line

RECIPE_WORDS = {"learning_rate": "learning rate", "finetuning_type": "fine-tuning"}


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
        *_rows(facts),
        "",
        _how(facts),
        f"Evidence `{evidence_hash}`, night `{facts.night_id}`.",
    ]
    return "\n".join(lines)


def with_switch(card: str, promotion: Promotion) -> str:
    """The card, headed by who put this version into service, when and why; the same again changes nothing."""
    why = f": {one_line(promotion.why)}" if promotion.why else ""
    verb = "Approved" if promotion.forwards else "Rolled back to"
    line = (
        f"**{verb}** by {one_line(promotion.by)} at {promotion.at:%Y-%m-%d %H:%M} UTC, instead of "
        f"`{promotion.from_adapter}`{why}."
    )
    return card if line in card else f"{line}\n\n{card}".rstrip()


def _rows(facts: NightFacts) -> list[str]:
    """Data, licences and method, in a table: what an audit asks for a year later."""
    delta, licences, extracted = facts.delta, facts.licences, extraction_line(facts.training)
    recipe = ", ".join(f"{RECIPE_WORDS.get(name, name)} {value}" for name, value in facts.recipe.items() if value)
    rows = {
        "adapter": f"`{facts.adapter_digest}`",
        "base": f"`{facts.base_digest}`",
        "licence of the base": one_line(licences.get("base", "")) or "not named: `nightschool model show`",
        "training data": f"`{delta.digest}`, {delta.label_rows + delta.replay_rows + delta.base_rows} rows",
        "licence of the data": one_line(licences.get("data", "")) or "not named: `projects.data_licence`",
        "chat template": f"`{facts.preflight.template_digest or 'not recorded'}`",
        "method": one_line(recipe),
        **({"extraction": extracted} if extracted else {}),
        "held out of training": f"{delta.held_out_items} labels",
        "trained on": one_line(facts.preflight.environment.get("device", "") or "not recorded"),
    }
    return ["| what | |", "|---|---|", *[f"| {name} | {value} |" for name, value in rows.items()]]


def _how(facts: NightFacts) -> str:
    if not facts.verdict.passed:
        return f"Not for production. {facts.verdict.hint}"
    return "To approve, move the alias `production` onto this version; to roll back later, move it back."
