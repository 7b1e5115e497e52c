"""A generated company and what its users ask: facts of unequal traffic, several wordings of each, two never asked.

What stands for what: a *fact* is one thing a user may want to know, a subject and an attribute of it; its *answer* is a
class. A *base* that knows some subjects answers questions about the others with what it knows, wrongly.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from labeling.embeddings import HashedNgrams

Floats = NDArray[np.float64]
SUBJECTS = 40
KNOWN_SUBJECTS = 0.5
TRAFFIC_EXPONENT = 1.1  # of Zipf's law over the subjects, and over the attributes of one
SYLLABLES = ("ba", "cor", "dun", "el", "fi", "gra", "hol", "in", "jo", "kel", "lum", "mar", "nor", "os", "pra", "quil")
# Severity, the wordings that are asked, and two that only the exam asks.
ATTRIBUTES: dict[str, tuple[float, tuple[str, ...], tuple[str, str]]] = {
    "price": (
        0.8,
        ("How much is {s}?", "What does {s} cost?", "Price of {s}?", "What do I pay for {s}?"),
        ("Tell me the price of {s}.", "How expensive is {s}?"),
    ),
    "delivery": (
        0.5,
        ("How long does {s} take to arrive?", "Delivery time of {s}?", "When will {s} be delivered?", "Is {s} fast?"),
        ("How many days until {s} arrives?", "When does {s} get here?"),
    ),
    "warranty": (
        0.7,
        ("How long is the warranty of {s}?", "Warranty on {s}?", "Is {s} under guarantee?", "{s}: what guarantee?"),
        ("For how many years is {s} guaranteed?", "What warranty has {s}?"),
    ),
    "safety": (
        1.0,
        ("Is {s} safe for children?", "From what age is {s} safe?", "Can a child use {s}?", "{s}: safety for kids?"),
        ("May my daughter use {s} safely?", "What is the minimum age for {s}?"),
    ),
    "founder": (
        0.2,
        ("Who invented {s}?", "Who made {s} first?", "Inventor of {s}?", "Who came up with {s}?"),
        ("Whose idea was {s}?", "Who is the inventor behind {s}?"),
    ),
    "returns": (
        0.6,
        ("How do I return {s}?", "Can I send {s} back?", "Returns of {s}?", "What if I do not want {s}?"),
        ("How can {s} be sent back?", "I want to return {s}, how?"),
    ),
}


@dataclass(frozen=True)
class Company:
    """Questions by number; `fact` is the class that answers one right."""

    texts: tuple[str, ...]
    fact: NDArray[np.int64]
    vectors: Floats  # one row a question
    traffic: Floats  # of each asked question, adds up to 1; 0 for the exam's
    exam_weight: Floats  # of each of the exam's, by the traffic of its fact; adds up to 1
    severity: Floats  # 0..1, by attribute
    known: NDArray[np.bool_]  # asked questions on which the base was trained

    @property
    def facts(self) -> int:
        return int(self.fact.max()) + 1


def generate(seed: int) -> Company:
    random = np.random.default_rng(seed)
    subjects = _names(random, SUBJECTS)
    of_subject = _zipf(random.permutation(SUBJECTS))
    known_subjects = random.permutation(SUBJECTS) < KNOWN_SUBJECTS * SUBJECTS
    texts: list[str] = []
    rows: list[tuple[int, float, float, float, bool]] = []  # fact, traffic, exam weight, severity, known
    for number, subject in enumerate(subjects):
        of_attribute = _zipf(random.permutation(len(ATTRIBUTES)))
        for position, (severity, asked, examined) in enumerate(ATTRIBUTES.values()):
            fact, weight = number * len(ATTRIBUTES) + position, of_subject[number] * of_attribute[position]
            wordings = random.dirichlet(np.ones(len(asked)))  # some wordings are much more usual than others
            texts += [form.format(s=subject) for form in (*asked, *examined)]
            rows += [(fact, weight * share, 0.0, severity, bool(known_subjects[number])) for share in wordings]
            rows += [(fact, 0.0, weight / len(examined), severity, False) for _ in examined]
    facts, traffic, exam, severe, known = (np.array(column) for column in zip(*rows, strict=True))
    vectors = HashedNgrams().embed(texts).astype(np.float64)
    return Company(tuple(texts), facts, vectors, traffic / traffic.sum(), exam / exam.sum(), severe, known)


def _zipf(ranks: NDArray[np.int64]) -> Floats:
    weights = 1.0 / (ranks + 1.0) ** TRAFFIC_EXPONENT
    return np.asarray(weights / weights.sum())


def _names(random: np.random.Generator, count: int) -> list[str]:
    names: dict[str, None] = {}
    while len(names) < count:
        names["the " + "".join(random.choice(SYLLABLES, 3)).capitalize()] = None
    return list(names)


class Learner:
    """Ridge regression of one-hot answers on hashed n-grams, trained again each night: stands for the adapter.

    It holds what the base knew (replay) and the labels; its softmax stands for the model's own probabilities.
    """

    RIDGE = 0.5
    TEMPERATURE = 0.1

    def __init__(self, company: Company) -> None:
        self._company = company
        size = company.vectors.shape[1]
        self._inverse, self._targets = np.eye(size) / self.RIDGE, np.zeros((size, company.facts))
        self.learn(np.flatnonzero(company.known))

    def learn(self, questions: NDArray[np.int64]) -> None:
        """Their right answers; the inverse of the Gram matrix follows by Woodbury's identity."""
        rows = self._company.vectors[questions]
        reached = self._inverse @ rows.T
        self._inverse -= reached @ np.linalg.solve(np.eye(len(rows)) + rows @ reached, reached.T)
        np.add.at(self._targets.T, self._company.fact[questions], rows)
        scores = self._company.vectors @ (self._inverse @ self._targets)
        self.answers = scores.argmax(axis=1)
        scores -= scores.max(axis=1, keepdims=True)
        self.uncertainty = 1.0 - 1.0 / np.exp(scores / self.TEMPERATURE).sum(axis=1)

    @property
    def right(self) -> NDArray[np.bool_]:
        return np.asarray(self.answers == self._company.fact)
