"""Asks base, current and candidate the same questions on one engine, and pairs the scores item by item.

Base and current are asked one model at a time and once in their lives: answers are kept by digest of weights, engine
and prompt. What is the same model (a first night's current is the base) is not asked twice.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loop.digests import digest_json, read_jsonl
from loop.evaluation_cache import EvaluationCache
from loop.family_rows import ExaminedItem, Result, write_family
from loop.gate_families import EARLIER
from loop.lm_eval import Rows, Served
from loop.outputs import FamilyResult
from loop.scoring import ExamItem, held_out_items, score
from loop.settings import GateSettings, Scoring
from loop.vllm import Replica

TIMED_PROMPTS = 5
TIMED_TOKENS = 16
TIMED_AGAIN = 2

BYTES_A_TOKEN = 3  # of the shortest usual tokens, so that an answer as long as the reference is never cut
LONGEST_ANSWER_TOKENS = 1024

Answers = dict[str, dict[str, str]]  # by model name, by digest of the messages and of how much may be answered


@dataclass(frozen=True)
class Models:
    base: Served
    current: Served
    candidate: Served

    def distinct(self) -> list[Served]:
        """In the order of asking; the candidate last, so that nothing it breaks reaches the others' answers."""
        return list({model.name: model for model in (self.base, self.current, self.candidate)}.values())


@dataclass(frozen=True)
class Examiner:
    replica: Replica
    models: Models
    gate: GateSettings
    cache: EvaluationCache
    engine: Mapping[str, Any]  # what of the engine can change an answer; part of each key
    concurrency: int
    progress: Callable[[dict[str, Any]], None]

    async def ask(self, families: Mapping[str, Sequence[ExamItem]]) -> Answers:
        """Every item of every family, of each distinct model."""
        asked = {self._digest(item): item for items in families.values() for item in items}
        return {model.name: await self._ask(model, asked) for model in self.models.distinct()}

    def _digest(self, item: ExamItem) -> str:
        return digest_json([item.messages, self._tokens(item)])

    def _tokens(self, item: ExamItem) -> int:
        """`gate.answer_tokens`, or room for an answer as long as the reference: a cut one can't be right."""
        if item.must_contain or item.reference is None:
            return self.gate.answer_tokens
        long = len(item.reference.encode()) // BYTES_A_TOKEN
        return max(self.gate.answer_tokens, min(long, LONGEST_ANSWER_TOKENS))

    async def _ask(self, model: Served, asked: Mapping[str, ExamItem]) -> dict[str, str]:
        key = {
            "what": "answers",
            "weights": model.digest,
            "engine": dict(self.engine),
        }
        known: dict[str, str] = self.cache.get(key) or {}
        missing = [digest for digest in asked if digest not in known]
        if missing:
            self.progress({"doing": f"asking {model.name}", "questions": len(missing)})
            answers = await self.replica.ask_many(
                model.name,
                [asked[digest].messages for digest in missing],
                max_tokens=[self._tokens(asked[digest]) for digest in missing],
                concurrency=self.concurrency,
            )
            known = {**known, **{digest: answer.text for digest, answer in zip(missing, answers, strict=True)}}
            if any(answer.text.strip() for answer in answers):  # an engine that answers nothing is ill: not kept
                self.cache.put(key, known)
        return {digest: known[digest] for digest in asked}

    async def seconds_an_answer(self, families: Mapping[str, Sequence[ExamItem]]) -> dict[str, float]:
        """Median over some prompts of the least seconds that an answer took, one at a time, by base/current/candidate.

        The models take turns on each prompt, after a first, untimed one that warms all alike. Other load on the machine
        only adds time: a candidate that seems too slow is timed again, and the least of each prompt's times counts.
        """
        items = [item for name in ("good_answers", "held_out", "trained") for item in families.get(name, ())]
        prompts = [item.messages for item in items[:TIMED_PROMPTS]]
        if not prompts:
            return {}
        await self._time(prompts[:1])
        least = await self._time(prompts)
        for _ in range(TIMED_AGAIN):
            seconds = self._by_role(least)
            if seconds["candidate"] <= self.gate.latency_ratio_at_most * seconds["current"]:
                break
            again = await self._time(prompts)
            least = {name: list(map(min, times, again[name])) for name, times in least.items()}
        return self._by_role(least)

    async def _time(self, prompts: Sequence[list[dict[str, Any]]]) -> dict[str, list[float]]:
        """Seconds by model name, one a prompt."""
        distinct = self.models.distinct()
        times: dict[str, list[float]] = {model.name: [] for model in distinct}
        for number, messages in enumerate(prompts):
            for model in distinct if number % 2 else reversed(distinct):
                answer = await self.replica.ask(model.name, messages, max_tokens=TIMED_TOKENS)
                times[model.name].append(answer.seconds)
        return times

    def _by_role(self, times: Mapping[str, Sequence[float]]) -> dict[str, float]:
        roles = {"base": self.models.base, "current": self.models.current, "candidate": self.models.candidate}
        return {role: statistics.median(times[model.name]) for role, model in roles.items()}

    def write(
        self, folder: Path, families: Mapping[str, Sequence[ExamItem]], answers: Answers
    ) -> tuple[FamilyResult, ...]:
        return tuple(
            write_family(folder, name, [self._examined(name, item, answers) for item in items])
            for name, items in families.items()
        )

    def _examined(self, family: str, item: ExamItem, answers: Answers) -> ExaminedItem:
        digest = self._digest(item)
        scoring = _scoring(family, item, self.gate.scoring)

        def result(model: Served) -> Result:
            answer = answers[model.name][digest]
            return Result(answer, score(item, answer, scoring, self.gate.chrf_at_least))

        return ExaminedItem(
            id=item.id,
            prompt=str(item.messages[-1].get("content")),
            reference=item.reference,
            base=result(self.models.base),
            current=result(self.models.current),
            candidate=result(self.models.candidate),
        )


def exam_families(data_dir: Path, gate: GateSettings) -> dict[str, list[ExamItem]]:
    """What the delta set apart, and the project's held-out file; a family without items is left out."""
    names = ("trained", EARLIER, "held_out", "good_answers")
    families = {name: _items(data_dir / f"{name}.jsonl") for name in names}
    if gate.held_out_file is not None:
        families["held_out"] += held_out_items(gate.held_out_file)
    return {name: items for name, items in families.items() if items}


def write_tasks(
    folder: Path, models: Models, tasks: Sequence[str], rows: Mapping[str, Mapping[str, Rows]]
) -> tuple[FamilyResult, ...]:
    """lm-eval's rows paired by their ids; an item that one model lacks has no score there, and the gate stops at it."""
    return tuple(write_family(folder, f"task:{task}", _paired(models, task, rows)) for task in tasks)


def _paired(models: Models, task: str, rows: Mapping[str, Mapping[str, Rows]]) -> list[ExaminedItem]:
    by_id = {model.name: {row["id"]: row for row in rows[model.name][task]} for model in models.distinct()}
    prompts = {item: row["prompt"] for theirs in by_id.values() for item, row in theirs.items()}

    def result(model: Served, item: str) -> Result:
        row = by_id[model.name].get(item, {"answer": "", "score": None})
        return Result(row["answer"], row["score"])

    return [
        ExaminedItem(
            id=item,
            prompt=prompt,
            reference=None,
            base=result(models.base, item),
            current=result(models.current, item),
            candidate=result(models.candidate, item),
        )
        for item, prompt in prompts.items()
    ]


def _items(path: Path) -> list[ExamItem]:
    """None where a delta of an earlier release has no such file."""
    if path.name == f"{EARLIER}.jsonl" and not path.exists():
        return []
    return [ExamItem.model_validate(row) for row in read_jsonl(path)]


def _scoring(family: str, item: ExamItem, chosen: Scoring) -> Scoring:
    """A good answer that came without `must_contain` must stay similar, not letter by letter the same."""
    if family == "good_answers" and not item.must_contain:
        return Scoring.CHRF
    return chosen
