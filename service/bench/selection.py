"""How many labels each way of choosing needs for the same share of mistakes mended, on a replayed stream of questions.

Companies, users and the learner are generated (`selection_world`); scores, lots and novelty are the product's own code.
A day: users ask, some wrong answers and a few right ones are flagged, flags on one wording become one item, people
label the first of the queue, and at night the learner is trained again. The exam asks wordings that nobody asked,
weighted by traffic: the share of what the base had wrong that is right now. A label is a person's minute, also when it
says that the flagged answer was right.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from labeling.database import now
from labeling.embeddings import HashedNgrams
from labeling.labelled_index import LabelledIndex
from labeling.selection import chosen, place
from labeling.settings import SelectionSettings
from labeling.tables import Chosen, ReviewItem
from service.bench.figure import Figure, Say
from service.bench.promises import held
from service.bench.selection_world import Company, Floats, Learner, generate

COMPANIES = 12
FIRST_SEED = 100
NIGHTS = 20
REQUESTS_A_DAY = 400
LABELS_A_DAY = 20
SCORED_EVERY = 5  # labels: the worker looks many times a day
FLAG_WRONG, FLAG_RIGHT = 0.3, 0.02  # share of wrong, and of right answers, that users flag
SEVERITY_NOISE = 0.2  # standard deviation of what a user says around what the attribute deserves
# Shares mended. The figures are those of the first: of the second, meant as the headline at first, most companies
# fall short with any policy, and what is never reached can't be compared. Both are printed.
TARGETS = (0.3, 0.5)
RESAMPLES = 2000
NEUTRAL = dict.fromkeys(("severity", "uncertainty", "novelty", "traffic"), 0.0)
POLICIES: dict[str, SelectionSettings] = {
    "random": SelectionSettings(random_share=1),
    **{name: SelectionSettings.model_validate({**NEUTRAL, name: 1, "random_share": 0}) for name in NEUTRAL},
    "score": SelectionSettings(random_share=0),
    "score, a tenth by lot": SelectionSettings(),
}


@dataclass(frozen=True)
class Run:
    """Shares mended after 0, LABELS_A_DAY, 2 LABELS_A_DAY, ... labels."""

    mended: Floats
    harm_mended: Floats  # the same, weighted by severity too
    corrections: int
    labels: int


def run(say: Say) -> list[Figure]:
    runs: dict[str, list[Run]] = {name: [] for name in POLICIES}
    for number in range(COMPANIES):
        company = generate(FIRST_SEED + number)
        for name, settings in POLICIES.items():
            runs[name].append(replay(company, settings, FIRST_SEED + number))
        say(f"company {number + 1} of {COMPANIES}")
    for line in table(runs):
        say(line)
    return [
        _figure("labels_random_vs_score", runs, "score"),
        _figure("labels_random_vs_score_with_slice", runs, "score, a tenth by lot"),
    ]


def _figure(name: str, runs: Mapping[str, Sequence[Run]], policy: str) -> Figure:
    target = TARGETS[0]
    ratio, low, high = saving(runs["random"], runs[policy], target)
    seen = {which: [labels_needed(one, target) for one in runs[which]] for which in ("random", policy)}
    needed = "; ".join(f"{which} {_told(found)}" for which, found in seen.items())
    return held(
        name,
        ratio,
        f"labels for {100 * target:.0f} % mended: {needed}; 95 % interval of the ratio {low:.2f} to {high:.2f}, "
        f"{len(runs[policy])} companies",
    )


def _told(needed: Sequence[tuple[float, bool]]) -> str:
    missed = sum(not reached for _, reached in needed)
    return f"{np.mean([labels for labels, _ in needed]):.0f}{f' ({missed} never)' if missed else ''}"


def replay(company: Company, settings: SelectionSettings, seed: int) -> Run:
    """The same requests and the same users' whims for every policy of one seed."""
    desk = Desk(company, settings, seed)
    wrong_first = ~desk.learner.right
    mended, harm = [0.0], [0.0]
    random = np.random.default_rng(seed + 1)
    for _ in range(NIGHTS):
        asked = random.choice(len(company.texts), REQUESTS_A_DAY, p=company.traffic)
        whims, noise = random.random(REQUESTS_A_DAY), random.normal(0, SEVERITY_NOISE, REQUESTS_A_DAY)
        right = desk.learner.right[asked]
        for index in np.flatnonzero(whims < np.where(right, FLAG_RIGHT, FLAG_WRONG)):
            question = int(asked[index])
            desk.flag(question, float(np.clip(company.severity[question] + noise[index], 0, 1)))
        desk.label(LABELS_A_DAY)
        fixed = wrong_first & desk.learner.right
        mended.append(_share(company.exam_weight, fixed, wrong_first))
        harm.append(_share(company.exam_weight * company.severity, fixed, wrong_first))
    return Run(np.array(mended), np.array(harm), desk.corrections, desk.labels)


def _share(weight: Floats, part: NDArray[np.bool_], whole: NDArray[np.bool_]) -> float:
    return float(weight[part].sum() / weight[whole].sum())


@dataclass
class Desk:
    """The review queue and the people at it."""

    company: Company
    settings: SelectionSettings
    seed: int
    corrections: int = 0
    labels: int = 0
    _items: dict[int, ReviewItem] = field(default_factory=dict)  # open ones, by question
    _seen: set[int] = field(default_factory=set)  # labelled before
    _made: int = 0

    def __post_init__(self) -> None:
        self.learner = Learner(self.company)
        self._labelled = LabelledIndex(HashedNgrams())

    def flag(self, question: int, severity: float) -> None:
        item = self._items.get(question)
        if item is None:
            item = self._items[question] = self._new(question)
        item.count += 1
        item.severity = severity if item.count == 1 else max(item.severity, severity)

    def _new(self, question: int) -> ReviewItem:
        self._made += 1
        item_id = f"it_{self.seed}_{self._made}"
        text = self.company.texts[question]
        item = ReviewItem(id=item_id, project="", prompt_digest="", messages=[{"content": text}], answer="")
        item.chosen = chosen(item_id, self.settings)
        item.uncertainty = float(self.learner.uncertainty[question])
        item.scored_at = None
        item.served = str(int(self.learner.answers[question]))
        return item

    def label(self, count: int) -> None:
        """The first `count`, scored again every now and then; then the night."""
        learnt: list[int] = []
        for start in range(0, count, SCORED_EVERY):
            for question in self._head(min(SCORED_EVERY, count - start)):
                item = self._items.pop(question)
                self.labels += 1
                self._seen.add(question)
                self._labelled.add([item.id], [self.company.texts[question]])
                if int(item.served or 0) != int(self.company.fact[question]):  # else it was flagged wrongly
                    self.corrections += 1
                    learnt.append(question)
        if learnt:
            self.learner.learn(np.array(learnt))

    def _head(self, count: int) -> list[int]:
        questions = list(self._items)
        novelty = self._labelled.novelty([self.company.texts[question] for question in questions])
        for question, value in zip(questions, novelty, strict=True):
            self._items[question].novelty = None if question in self._seen else value
        for lots in (False, True):
            others = sorted(item.score for item in self._items.values() if item.chosen is Chosen.SCORE) if lots else []
            for item in self._items.values():
                if (item.chosen is Chosen.RANDOM) == lots:
                    place(item, self.settings, others)
                    item.scored_at = now()
        return sorted(questions, key=lambda question: (-self._items[question].score, self._items[question].id))[:count]


def labels_needed(one: Run, target: float) -> tuple[float, bool]:
    """Between two nights linearly; all labels, and False, where the target was not reached."""
    above = np.flatnonzero(one.mended >= target)
    if not len(above):
        return float(LABELS_A_DAY * NIGHTS), False
    night = int(above[0])
    before, after = float(one.mended[night - 1]), float(one.mended[night])
    return LABELS_A_DAY * (night - 1 + (target - before) / (after - before)), True


def saving(random: Sequence[Run], policy: Sequence[Run], target: float) -> tuple[float, float, float]:
    """Labels that random needs for each that the policy needs: geometric mean over companies, bootstrap 95 %."""
    pairs = zip(random, policy, strict=True)
    logs = np.array([np.log(labels_needed(r, target)[0] / labels_needed(p, target)[0]) for r, p in pairs])
    draws = np.random.default_rng(0).choice(logs, (RESAMPLES, len(logs))).mean(axis=1)
    low, high = np.quantile(draws, (0.025, 0.975))
    return float(np.exp(logs.mean())), float(np.exp(low)), float(np.exp(high))


def table(runs: Mapping[str, Sequence[Run]]) -> list[str]:
    lines = []
    for name, of_policy in runs.items():
        cells = []
        for target in TARGETS:
            needed = [labels_needed(one, target) for one in of_policy]
            ratio, low, high = saving(runs["random"], of_policy, target)
            cells.append(f"{100 * target:.0f} %: {_told(needed)} labels, x{ratio:.2f} ({low:.2f} to {high:.2f})")
        corrected = sum(one.corrections for one in of_policy) / sum(one.labels for one in of_policy)
        end, harm = (float(np.mean([getattr(o, part)[-1] for o in of_policy])) for part in ("mended", "harm_mended"))
        cells.append(f"end: {100 * end:.0f} % mended, {100 * harm:.0f} % by severity")
        lines.append(f"{name}: {'; '.join(cells)}; {100 * corrected:.0f} % of labels gave a correction")
    return lines
