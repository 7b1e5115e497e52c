"""Scores one answer against one exam item, by the project's choice: 0 or 1. No judge: deterministic and offline."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from jsonschema import Draft202012Validator
from jsonschema.exceptions import SchemaError
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from labeling.errors import InvalidInput
from labeling.wording import folded, stands_in
from loop.digests import read_jsonl
from loop.settings import Scoring

CHRF_ORDER = 6
CHRF_BETA = 2.0
NUMBER = re.compile(r"(?<![\w.])[-+]?\d+(?:,\d{3})*(?:\.\d+)?")
EDGES = " \t\n.,;:!?\"'"


class BadExamItem(InvalidInput):
    code = "bad_exam_item"
    default_hint = "Correct the item, or choose another projects.gate.scoring."


class BadHeldOutFile(InvalidInput):
    code = "bad_held_out_file"
    default_hint = 'Each line must be a JSON object {"id", "question", "accept": [texts, any of which is right]}.'


class ExamItem(BaseModel):
    """One prompt of the gate. `must_contain`: every entry must be met; an entry "a|b" is met by either."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    id: str
    messages: list[dict[str, Any]]
    reference: str | None = None  # the right answer as written by a person, or the good answer that was given
    must_contain: list[str] = []
    not_again: str | None = None  # nobody wrote the right answer: right is whatever is unlike this one


class _Question(BaseModel):
    """A row of `gate.held_out_file` and of our general probes."""

    id: str = Field(min_length=1)
    question: str = Field(min_length=1)
    accept: list[str] = Field(min_length=1)


def score(item: ExamItem, answer: str, scoring: Scoring, chrf_at_least: float = 0.6) -> float:
    """1.0 when the answer is right, else 0.0; an empty answer never is. BadExamItem: the item can't be scored so."""
    if not answer.strip():
        return 0.0
    if item.not_again is not None:
        return float(chrf(answer, item.not_again) < chrf_at_least)
    if scoring is Scoring.CHRF:
        return float(chrf(answer, _reference(item, scoring)) >= chrf_at_least)
    return float(_SCORERS[scoring](item, answer))


def question_item(row: dict[str, Any]) -> ExamItem:
    """An exam item of one question with a list of acceptable answers."""
    question = _Question.model_validate(row)
    return ExamItem(
        id=question.id,
        messages=[{"role": "user", "content": question.question}],
        reference=question.accept[0].split("|")[0],
        must_contain=["|".join(question.accept)],
    )


def held_out_items(path: Path) -> list[ExamItem]:
    """The rows of `gate.held_out_file`; a bad or repeated row is named with its line."""
    items: dict[str, ExamItem] = {}
    try:
        rows = read_jsonl(path)
    except OSError as error:
        raise BadHeldOutFile(f"cannot read {path}: {error.strerror}") from error
    except ValueError as error:
        raise BadHeldOutFile(f"{path} is not JSON lines: {error}") from error
    for number, row in enumerate(rows, 1):
        try:
            item = question_item(row)
        except ValidationError as error:
            problem = error.errors()[0]
            where = ".".join(map(str, problem["loc"])) or "row"
            raise BadHeldOutFile(f"{path}, row {number}: {where}: {problem['msg']}") from error
        if item.id in items:
            raise BadHeldOutFile(f"{path}, row {number}: id {item.id!r} stands there twice")
        items[item.id] = item
    return list(items.values())


def chrf(answer: str, reference: str) -> float:
    """chrF2, 0..1: F-score (beta 2) of character 1- to 6-grams without spaces (Popovic 2015; as sacrebleu's)."""
    hypothesis, target = "".join(answer.split()), "".join(reference.split())
    precisions, recalls = [], []
    for order in range(1, CHRF_ORDER + 1):
        ours, theirs = _grams(hypothesis, order), _grams(target, order)
        if ours and theirs:
            same = (ours & theirs).total()
            precisions.append(same / ours.total())
            recalls.append(same / theirs.total())
    if not precisions:
        return 0.0
    precision, recall = sum(precisions) / len(precisions), sum(recalls) / len(recalls)
    if precision + recall == 0:
        return 0.0
    return (1 + CHRF_BETA**2) * precision * recall / (CHRF_BETA**2 * precision + recall)


def _grams(text: str, order: int) -> Counter[str]:
    return Counter(text[i : i + order] for i in range(len(text) - order + 1))


def _reference(item: ExamItem, scoring: Scoring) -> str:
    if item.reference is None or not item.reference.strip():
        raise BadExamItem(f"exam item {item.id} has no reference answer, which scoring {scoring.value!r} needs")
    return item.reference


def _exact(item: ExamItem, answer: str) -> bool:
    return folded(answer).strip(EDGES) == folded(_reference(item, Scoring.EXACT)).strip(EDGES)


def _contains(item: ExamItem, answer: str) -> bool:
    wanted = item.must_contain or [_reference(item, Scoring.CONTAINS).replace("|", " ")]
    return all(stands_in(answer, entry) for entry in wanted)


def _regex(item: ExamItem, answer: str) -> bool:
    """Each `must_contain` entry is a pattern to be found; without any, the reference is one for the whole answer."""
    try:
        if item.must_contain:
            return all(re.search(entry, answer, re.IGNORECASE) for entry in item.must_contain)
        return bool(re.fullmatch(_reference(item, Scoring.REGEX), answer.strip(), re.IGNORECASE))
    except re.error as error:
        raise BadExamItem(f"exam item {item.id} has a bad regular expression: {error}") from error


def _numeric(item: ExamItem, answer: str) -> bool:
    """Every number of `must_contain`, or else the reference's last one, stands in the answer."""
    wanted = [_numbers(entry) for entry in item.must_contain]
    if not wanted:
        wanted = [_numbers(_reference(item, Scoring.NUMERIC))[-1:]]
    if not all(wanted):
        raise BadExamItem(f"exam item {item.id} has no number to compare with")
    given = _numbers(answer)
    return all(any(abs(x - y) <= 1e-6 * max(1.0, abs(y)) for x in given for y in any_of) for any_of in wanted)


def _numbers(text: str) -> list[float]:
    return [float(found.replace(",", "")) for found in NUMBER.findall(folded(text))]


def _json_schema(item: ExamItem, answer: str) -> bool:
    """The reference is a JSON schema (it has "$schema"), or a right answer whose keys and types must be there."""
    try:
        reference = json.loads(_reference(item, Scoring.JSON_SCHEMA))
        schema = reference if isinstance(reference, dict) and "$schema" in reference else _shape(reference)
        Draft202012Validator.check_schema(schema)
    except json.JSONDecodeError as error:
        raise BadExamItem(f"exam item {item.id}: its reference is not JSON: {error}") from error
    except SchemaError as error:
        raise BadExamItem(f"exam item {item.id}: its JSON schema is wrong: {error.message}") from error
    try:
        return bool(Draft202012Validator(schema).is_valid(json.loads(answer)))
    except json.JSONDecodeError:
        return False


def _shape(value: Any) -> dict[str, Any]:
    if isinstance(value, dict):
        return {"type": "object", "required": list(value), "properties": {k: _shape(v) for k, v in value.items()}}
    if isinstance(value, list):
        return {"type": "array", "items": _shape(value[0])} if value else {"type": "array"}
    names: dict[type, str] = {bool: "boolean", int: "number", float: "number", str: "string", type(None): "null"}
    return {"type": names[type(value)]}


_SCORERS: dict[Scoring, Callable[[ExamItem, str], bool]] = {
    Scoring.EXACT: _exact,
    Scoring.CONTAINS: _contains,
    Scoring.REGEX: _regex,
    Scoring.NUMERIC: _numeric,
    Scoring.JSON_SCHEMA: _json_schema,
}
