"""How a night teaches, and which way when the project leaves it to the data: the rule of docs/methods.md.

Corrections are shown as right answers (sft). A label also says which answer it beats: pairs for dpo and orpo. Thumbs
are answers that users rated, without anybody having written a better one: kto.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

Method = Literal["sft", "dpo", "orpo", "kto", "sft+dpo"]
METHODS: tuple[Method, ...] = get_args(Method)
PATTERN = f"^(auto|{'|'.join(METHODS).replace('+', '[+]')})$"
NEEDS_LABELS, NEEDS_PAIRS = frozenset({"sft", "sft+dpo"}), frozenset({"dpo", "orpo", "sft+dpo"})


def shows_answers(method: Method, *, corrections: bool) -> bool:
    """Whether there is a phase of sft. Before kto there is where there are corrections: thumbs say nothing of them, and
    they would be forgotten."""
    return method in NEEDS_LABELS or (method == "kto" and corrections)


@dataclass(frozen=True)
class OnHand:
    """What a night could train on and the adapter that serves has not seen; `older_labels`: those it has seen."""

    corrections: int  # labels with a right answer that a person wrote
    preferences: int  # labels that say which of two shown answers is better
    pairs: int  # labels of both kinds that beat an answer
    good_thumbs: int
    bad_thumbs: int
    older_labels: int = 0
    older_corrections: int = 0

    @property
    def labels(self) -> int:
        return self.corrections + self.preferences


@dataclass(frozen=True)
class Needed:
    labels: int  # project.min_labels, of pairs too
    thumbs: int  # of each kind


@dataclass(frozen=True)
class Choice:
    method: Method
    why: str


@dataclass(frozen=True)
class TooFew:
    """`reason` ends with how many more of which kind would do."""

    reason: str
    hint: str


def choose(setting: str, have: OnHand, needed: Needed) -> Choice | TooFew:
    """`setting`: trainer.method."""
    if setting == "auto":
        return _by_data(have, needed)
    method: Method = next(known for known in METHODS if known == setting)
    why = f"trainer.method = {setting!r}"
    missing = shortage(method, have, needed)
    return TooFew(f"{why}: {missing.reason}", missing.hint) if missing else Choice(method, why)


def shortage(method: Method, have: OnHand, needed: Needed) -> TooFew | None:
    """Asked again once the unfit rows are out: what is left might be worth nothing."""
    missing = [text for text in (_labels_missing(method, have, needed), _thumbs_missing(method, have, needed)) if text]
    return TooFew("; ".join(missing), _hint(method)) if missing else None


def _by_data(have: OnHand, needed: Needed) -> Choice | TooFew:
    """Right answers before comparisons before thumbs: each says less than the one before."""
    older = f" and {have.older_labels} older labels" if have.older_labels else ""
    if have.labels >= needed.labels and (have.corrections or have.older_corrections):
        return Choice(
            "sft", f"auto: {have.corrections} corrections{older} say what is right; they are shown as answers"
        )
    if have.pairs >= needed.labels:
        return Choice(
            "dpo", f"auto: {have.pairs} preferences and no correction say which answer is better, not which is right"
        )
    if have.labels >= needed.labels:
        return Choice(
            "sft", f"auto: of {have.labels} labels only {have.pairs} beat an answer; they are shown as answers"
        )
    if have.good_thumbs >= needed.thumbs and have.bad_thumbs >= needed.thumbs:
        return Choice(
            "kto", f"auto: only {have.labels} new labels, but {_thumbs(have)} without a correction{_kept(have)}"
        )
    reason = f"{have.labels} new labels; {needed.labels} are needed: {needed.labels - have.labels} more"
    if have.good_thumbs or have.bad_thumbs:
        reason += (
            f" (or thumbs, of which {needed.thumbs} up and {needed.thumbs} down are needed: {_thumbs(have)} are there)"
        )
    return TooFew(reason, _hint("sft"))


def _thumbs(have: OnHand) -> str:
    return f"{have.good_thumbs} thumbs up and {have.bad_thumbs} down"


def _kept(have: OnHand) -> str:
    return f"; the {have.older_labels} older labels are shown first, so that they stay" if have.older_labels else ""


def _labels_missing(method: Method, have: OnHand, needed: Needed) -> str:
    if method in NEEDS_PAIRS and have.pairs < needed.labels:
        what = "new labels beat an answer that was shown"
        return f"{have.pairs} {what}; {needed.labels} are needed: {needed.labels - have.pairs} more"
    if method in NEEDS_LABELS and have.labels < needed.labels:
        return f"{have.labels} new labels; {needed.labels} are needed: {needed.labels - have.labels} more"
    return ""


def _thumbs_missing(method: Method, have: OnHand, needed: Needed) -> str:
    if method != "kto":
        return ""
    kinds = (("up", have.good_thumbs), ("down", have.bad_thumbs))
    return "; ".join(
        f"{count} thumbs {kind}; {needed.thumbs} are needed: {needed.thumbs - count} more"
        for kind, count in kinds
        if count < needed.thumbs
    )


def _hint(method: Method) -> str:
    if method == "kto":
        return 'Collect more ratings, lower trainer.min_thumbs, or label items and use trainer.method = "auto".'
    return "Label more items, lower `min_labels`, or confirm held labels with `nightschool labels confirm`."
