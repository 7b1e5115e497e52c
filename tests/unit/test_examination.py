"""Asking and pairing: who is asked what, what is kept, and that no model's answer is taken for another's."""

from __future__ import annotations

import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from loop.digests import write_jsonl
from loop.evaluation_cache import EvaluationCache
from loop.examination import Examiner, Models, exam_families, write_tasks
from loop.family_rows import read_family
from loop.lm_eval import OURS, BadTask, Served, tasks_digest_parts
from loop.scoring import ExamItem
from loop.settings import GateSettings, TaskSettings
from loop.vllm import Replica
from tests.adapters import TINY, write_adapter
from tests.fakes.vllm import FakeVllm

BASE, CURRENT, CANDIDATE = Served("base", "sha256:b"), Served("app@v2", "sha256:2"), Served("app@v3", "sha256:3")
QUICK = GateSettings(answer_tokens=20)


def items(count: int, *, must: str = "right") -> list[ExamItem]:
    return [
        ExamItem(id=str(n), messages=[{"role": "user", "content": f"q{n}"}], reference="right", must_contain=[must])
        for n in range(count)
    ]


def examiner(fake: FakeVllm, data_dir: Path, models: Models, engine: dict[str, Any] | None = None) -> Examiner:
    return Examiner(
        replica=Replica(fake.url),
        models=models,
        gate=QUICK,
        cache=EvaluationCache(data_dir),
        engine=engine or {"dtype": "bfloat16"},
        concurrency=4,
        progress=lambda line: None,
    )


async def serve(fake: FakeVllm, folder: Path) -> None:
    for number, model in enumerate((CURRENT, CANDIDATE)):
        await Replica(fake.url).load(model.name, write_adapter(folder / model.name, TINY, seed=number))


def asked(fake: FakeVllm) -> Counter[str]:
    return Counter(seen.body["model"] for seen in fake.seen)


async def test_each_models_answers_stay_its_own(tmp_path: Path) -> None:
    """Three models, three answers an item, paired by item."""
    async with FakeVllm(answer=lambda model, prompt: f"{model} {'right' if model != 'base' else 'no'}") as fake:
        await serve(fake, tmp_path)
        exam = examiner(fake, tmp_path, Models(BASE, CURRENT, CANDIDATE))
        families = {"trained": items(5)}
        (result,) = exam.write(tmp_path, families, await exam.ask(families))
    assert (result.base, result.current, result.candidate) == (0.0, 1.0, 1.0)
    assert (result.n, result.lost, result.won) == (5, 0, 0)


async def test_a_current_model_that_is_the_base_is_not_asked_twice(tmp_path: Path) -> None:
    """On a first night two models are asked, not three."""
    async with FakeVllm() as fake:
        await serve(fake, tmp_path)
        exam = examiner(fake, tmp_path, Models(BASE, BASE, CANDIDATE))
        await exam.ask({"trained": items(4), "good_answers": items(4)})
        assert asked(fake) == {"base": 4, "app@v3": 4}
        seconds = await exam.seconds_an_answer({"trained": items(4)})
    assert seconds["base"] == seconds["current"] > 0


async def test_answers_are_kept_by_digest(tmp_path: Path) -> None:
    """The next night asks only the new weights and the new questions; another engine asks all anew."""
    async with FakeVllm() as fake:
        await serve(fake, tmp_path)
        await examiner(fake, tmp_path, Models(BASE, BASE, CURRENT)).ask({"trained": items(4)})
        fake.seen.clear()
        promoted = examiner(fake, tmp_path, Models(BASE, CURRENT, CANDIDATE))
        again = await promoted.ask({"trained": items(6)})
        assert asked(fake) == {"base": 2, "app@v2": 2, "app@v3": 6}
        assert {len(answers) for answers in again.values()} == {6}
        fake.seen.clear()
        other_bytes = Models(Served("base", "sha256:other"), CURRENT, CANDIDATE)
        await examiner(fake, tmp_path, other_bytes).ask({"trained": items(6)})
        assert asked(fake) == {"base": 6}
        fake.seen.clear()
        await examiner(fake, tmp_path, other_bytes, {"dtype": "float32"}).ask({"trained": items(1)})
        assert asked(fake) == {"base": 1, "app@v2": 1, "app@v3": 1}


async def test_an_ill_engines_silence_is_not_kept(tmp_path: Path) -> None:
    """Empty answers for all are shown to the gate, and asked again next time."""
    async with FakeVllm(answer=lambda model, prompt: "") as fake:
        await serve(fake, tmp_path)
        exam = examiner(fake, tmp_path, Models(BASE, BASE, CANDIDATE))
        families = {"trained": items(3)}
        (result,) = exam.write(tmp_path, families, await exam.ask(families))
        assert set(read_family(result).silent) == {"base", "current", "candidate"}
        fake.answer = lambda model, prompt: "right"
        fake.seen.clear()
        await exam.ask(families)
        assert asked(fake) == {"base": 3, "app@v3": 3}


async def test_the_time_of_an_answer_is_measured_for_each_model(tmp_path: Path) -> None:
    """In turn on the same prompts; one that is slower shows as slower."""
    async with FakeVllm() as fake:
        await serve(fake, tmp_path)
        fake.faults.slow_seconds = 0.02
        exam = examiner(fake, tmp_path, Models(BASE, CURRENT, CANDIDATE))
        seconds = await exam.seconds_an_answer({"good_answers": items(3)})
        assert set(seconds) == {"base", "current", "candidate"}
        assert all(0.02 <= value < 2 for value in seconds.values())
        assert len(set(asked(fake).values())) == 1
        assert await exam.seconds_an_answer({}) == {}


async def test_other_load_on_the_machine_does_not_make_a_candidate_slow(tmp_path: Path) -> None:
    """Its first answers are held up by something else: it is timed again. One that is always slow stays slow."""
    for held_up, slow in ((6, False), (1000, True)):
        calls: Counter[str] = Counter()

        def answer(model: str, prompt: str, calls: Counter[str] = calls, held_up: int = held_up) -> str:
            calls[model] += 1
            if model == CANDIDATE.name and calls[model] <= held_up:
                time.sleep(0.1)
            return "right"

        async with FakeVllm(answer=answer) as fake:
            await serve(fake, tmp_path / str(held_up))
            exam = examiner(fake, tmp_path, Models(BASE, CURRENT, CANDIDATE))
            seconds = await exam.seconds_an_answer({"good_answers": items(5)})
        assert (seconds["candidate"] > 0.1) == slow
        assert calls[CANDIDATE.name] in ((16,) if slow else (11, 16))


async def test_a_good_answer_may_be_worded_otherwise(tmp_path: Path) -> None:
    """Without `must_contain` it must stay similar; a flagged prompt's reference must still stand in the answer."""
    reference = "We ship within two working days, Monday to Friday."
    item = ExamItem(id="g", messages=[{"role": "user", "content": "q"}], reference=reference)
    async with FakeVllm(answer=lambda m, p: "We ship within two working days, from Monday to Friday!") as fake:
        await serve(fake, tmp_path)
        exam = examiner(fake, tmp_path, Models(BASE, BASE, CANDIDATE))
        families = {"good_answers": [item], "trained": [item]}
        good, trained = exam.write(tmp_path, families, await exam.ask(families))
    assert (good.candidate, trained.candidate) == (1.0, 0.0)


def test_task_rows_are_paired_by_id_and_a_gap_is_no_score(tmp_path: Path) -> None:
    """In any order; what one model lacks is not a number, so that the gate stops."""

    def rows(*pairs: tuple[str, float | None]) -> dict[str, list[dict[str, Any]]]:
        return {"t": [{"id": name, "score": score, "prompt": name, "answer": "x"} for name, score in pairs]}

    scores = {"base": rows(("a", 1.0), ("b", 0.0)), "app@v3": rows(("b", 1.0), ("a", 1.0))}
    (result,) = write_tasks(tmp_path, Models(BASE, BASE, CANDIDATE), ["t"], scores)
    assert (result.name, result.n, result.won, result.lost) == ("task:t", 2, 1, 0)
    scores["app@v3"] = rows(("b", 1.0))
    (short,) = write_tasks(tmp_path, Models(BASE, BASE, CANDIDATE), ["t"], scores)
    family = read_family(short)
    assert family.n == 2
    assert any(item.candidate != item.candidate for item in family.items)


def test_families_come_from_the_delta_and_the_held_out_file(tmp_path: Path) -> None:
    """Empty ones are left out."""
    for name, found in (("trained", items(2)), ("held_out", items(1)), ("good_answers", [])):
        write_jsonl(tmp_path / f"{name}.jsonl", [item.model_dump() for item in found])
    assert "earlier_fixes" not in exam_families(tmp_path, GateSettings())  # a delta that an earlier release has made
    write_jsonl(tmp_path / "earlier_fixes.jsonl", [item.model_dump() for item in items(1)])
    file = tmp_path / "company.jsonl"
    write_jsonl(file, [{"id": "c1", "question": "Who?", "accept": ["Ann", "Bo"]}])
    families = exam_families(tmp_path, GateSettings(held_out_file=file))
    assert {name: [item.id for item in found] for name, found in families.items()} == {
        "trained": ["0", "1"],
        "earlier_fixes": ["0"],
        "held_out": ["0", "c1"],
    }


def test_a_cached_file_that_is_damaged_counts_as_nothing(tmp_path: Path) -> None:
    """Cut short or of another key: measured again."""
    cache = EvaluationCache(tmp_path)
    cache.put({"k": 1}, {"v": 2})
    assert cache.get({"k": 1}) == {"v": 2}
    assert cache.get({"k": 2}) is None
    (file,) = cache.folder.iterdir()
    file.write_bytes(file.read_bytes()[:-3])
    assert cache.get({"k": 1}) is None


def test_a_task_that_its_folder_does_not_hold_is_named(tmp_path: Path) -> None:
    """Before anything is started; ours are there."""
    assert set(tasks_digest_parts(OURS)) == {"nightschool_general", "nightschool_choices"}
    with pytest.raises(BadTask, match="task: mine"):
        tasks_digest_parts([TaskSettings(name="mine", folder=tmp_path)])


async def test_a_long_answer_is_asked_for_at_length(tmp_path: Path) -> None:
    """Cut at `answer_tokens`, it could not be what it was, whichever model gives it: it would prove nothing."""
    long = "word " * 200
    good = ExamItem(id="g", messages=[{"role": "user", "content": "tell me"}], reference=long)
    async with FakeVllm() as fake:
        await serve(fake, tmp_path)
        await examiner(fake, tmp_path, Models(BASE, BASE, CANDIDATE)).ask({"good_answers": [good], "trained": items(1)})
        limits = {
            seen.body["messages"][0]["content"]: seen.body["max_tokens"]
            for seen in fake.seen
            if "max_tokens" in seen.body
        }
    assert limits["q0"] == QUICK.answer_tokens
    assert limits["tell me"] >= 200
