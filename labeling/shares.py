"""No one person alone may make up more than a share of what is trained: the oldest count, the others wait."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from labeling.tables import Label


def within_share(labels: Sequence[Label], share: float) -> tuple[list[Label], list[Label]]:
    """(taken, waiting), of labels oldest first. The share is of what is taken, so each cut lowers the next bound.

    Labels that several people gave count as nobody's alone. With one person and nobody else, nothing is taken.
    """
    taken = list(labels)
    while True:
        bound = int(share * len(taken) + 1e-9)
        used: Counter[str] = Counter()
        kept = []
        for label in taken:
            alone = label.annotators[0] if label.overlap == 1 and label.annotators else None
            if alone is None or used[alone] < bound:
                kept.append(label)
            if alone is not None:
                used[alone] += 1
        if len(kept) == len(taken):
            there = {label.id for label in taken}
            return taken, [label for label in labels if label.id not in there]
        taken = kept
