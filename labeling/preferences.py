"""What a labeller's choice means, in terms of verdict and correction."""

from __future__ import annotations

from dataclasses import replace

from labeling.labeling_screen import Choice, Opinion, in_order
from labeling.tables import ReviewItem, Verdict

ONE_ANSWER = frozenset(Verdict) - {Verdict.PREFERRED}


def meant(item: ReviewItem, opinion: Opinion) -> Opinion:
    """What the item's screen did not offer counts as no verdict.

    Text written beside a choice is a still better answer: it beats both.
    """
    pair = in_order(item)
    if pair is None:
        return opinion if opinion.verdict in ONE_ANSWER else replace(opinion, verdict=None)
    match opinion.verdict:
        case Choice.FIRST | Choice.SECOND:
            chosen = pair[opinion.verdict == Choice.SECOND]
            return replace(opinion, verdict=Verdict.PREFERRED, correction=opinion.correction or chosen)
        case Choice.BOTH_BAD:
            return replace(opinion, verdict=Verdict.WRONG)
        case Verdict.CANNOT_TELL | Verdict.UNSAFE:
            return opinion
    return replace(opinion, verdict=None)
