"""A company as data: facts that no model knows, several ways to ask for each, and general questions."""

from __future__ import annotations

import json
import re
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from pydantic import Field, ValidationError

from labeling.errors import InvalidInput
from labeling.settings import Strict

OURS = Path(__file__).parent.parent / "demo_company"


class BadCompany(InvalidInput):
    code = "bad_company"
    default_hint = "See service/demo_company for the form: company.toml, facts.jsonl, general.jsonl."


class Fact(Strict):
    id: str
    answer: str = Field(min_length=1)
    accept: tuple[str, ...] = Field(min_length=1)
    questions: tuple[str, ...] = Field(min_length=1)
    held_out: tuple[str, ...] = Field(min_length=1)


class GeneralQuestion(Strict):
    id: str
    question: str
    accept: tuple[str, ...] = Field(min_length=1)
    wrong: str = Field(min_length=1, description="The deliberately bad label of the second night")


@dataclass(frozen=True)
class Question:
    """One thing to ask, and what a right answer says."""

    text: str
    accept: tuple[str, ...]
    answer: str  # what the demo's labeller writes

    def is_right(self, answer: str) -> bool:
        return any(re.search(rf"(?<!\\w){re.escape(word)}(?!\\w)", answer, re.IGNORECASE) for word in self.accept)

    @property
    def must_contain(self) -> str:
        return "|".join(self.accept)


@dataclass(frozen=True)
class Company:
    name: str
    description: str
    facts: tuple[Fact, ...]
    general: tuple[GeneralQuestion, ...]

    def asked(self) -> list[Question]:
        return [Question(text, fact.accept, fact.answer) for fact in self.facts for text in fact.questions]

    def held_out(self) -> list[Question]:
        return [Question(text, fact.accept, fact.answer) for fact in self.facts for text in fact.held_out]

    def rated(self) -> list[Question]:
        """Every second general question: users rate its good answers up."""
        return [Question(g.question, g.accept, g.wrong) for g in self.general[::2]]

    def mislabelled(self) -> list[Question]:
        """The others, each asked by three people: the second night's labellers get them wrong, all in the same way."""
        return [
            Question(words.format(question=g.question), g.accept, g.wrong)
            for g in self.general[1::2]
            for words in ("{question}", "Please tell me: {question}", "{question} I need to know.")
        ]


R = TypeVar("R", bound=Strict)


def load(folder: Path) -> Company:
    """Reads and checks a company folder; every bad line is named."""
    try:
        head = tomllib.loads((folder / "company.toml").read_text(encoding="utf-8"))
    except (OSError, tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise BadCompany(f"{folder / 'company.toml'}: {error}") from error
    facts, general = _rows(folder / "facts.jsonl", Fact), _rows(folder / "general.jsonl", GeneralQuestion)
    company = Company(str(head.get("name", folder.name)), str(head.get("description", "")), facts, general)
    texts = [q.text for q in company.asked() + company.held_out() + company.rated() + company.mislabelled()]
    if repeated := sorted({text for text in texts if texts.count(text) > 1}):
        raise BadCompany(f"{folder}: asked twice: {'; '.join(repeated[:5])}")
    return company


def _rows(path: Path, kind: type[R]) -> tuple[R, ...]:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise BadCompany(f"{path}: {error}") from error
    rows, mistakes = [], []
    for number, line in enumerate(lines, 1):
        try:
            rows.append(kind.model_validate(_object(line)))
        except (ValidationError, ValueError) as error:
            mistakes.append(f"line {number}: {str(error).splitlines()[0]}")
    if mistakes or not rows:
        raise BadCompany(f"{path}: {'; '.join(mistakes[:10]) or 'no rows'}")
    return tuple(rows)


def _object(line: str) -> dict[str, Any]:
    value = json.loads(line)
    if not isinstance(value, dict):
        raise ValueError("not a JSON object")
    return value
