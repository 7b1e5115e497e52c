"""Report, model card and evidence: the decision first, every number there, and a hash that notices any change."""

from __future__ import annotations

import json
from dataclasses import replace
from datetime import UTC, date, datetime
from pathlib import Path

import pytest

from labeling.database import Database, now
from loop.digests import read_jsonl, write_jsonl
from loop.evidence import build_evidence, evidence_hash, is_genuine, keep_evidence
from loop.family_rows import ExaminedItem, Result, read_family, regressions, write_family
from loop.model_card import model_card, with_switch
from loop.outputs import Delta, Evaluated, FamilyResult, Preflight, Registered
from loop.report import NightFacts, report, summary
from loop.settings import GateSettings
from loop.stages.decide import expected_families, judge
from loop.tables import Evidence, Night, NightState, Promotion

GATE = GateSettings(margin_points=8.0, general_probes=False)


def examined(name: str, base: float, current: float, candidate: float) -> ExaminedItem:
    def result(score: float) -> Result:
        return Result("Oslo | the right one" if score else "no <b>idea</b>", score)

    return ExaminedItem(name, f"Question {name}?", "Oslo", result(base), result(current), result(candidate))


def write_data(folder: Path, **counts: int) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("trained", "held_out", "good_answers"):
        rows = [{"id": f"{name}-{n}", "messages": [], "reference": "Oslo"} for n in range(counts.get(name, 0))]
        write_jsonl(folder / f"{name}.jsonl", rows)
    return folder


def facts(folder: Path, *, lost: int = 0, wrong_score: float | None = None) -> NightFacts:
    """A night of 12 flagged prompts, all fixed, and 80 good answers of which `lost` are lost."""
    data = write_data(folder / "data", trained=12, good_answers=80)
    trained = [examined(f"trained-{n}", 0, 0, 1) for n in range(12)]
    good = [examined(f"good_answers-{n}", 1, 1, float(n >= lost)) for n in range(80)]
    if wrong_score is not None:
        good[5] = replace(good[5], candidate=Result("", wrong_score))
    families = (write_family(folder, "trained", trained), write_family(folder, "good_answers", good))
    delta = Delta(
        data_dir=str(data), digest="sha256:d", label_ids=("lb_1",), label_rows=12, replay_rows=3, base_rows=9,
        held_out_items=0, notes=("lb_9 left out of training: its prompt is that of held-out item h1",),
    )  # fmt: skip
    evaluated = Evaluated(
        current="app@v1", current_digest="sha256:c", families=families, tasks_digest="sha256:t", probe={"p": [1.5]},
        applied=True, seconds_an_answer={"base": 0.5, "current": 0.5, "candidate": 0.7},
    )  # fmt: skip
    registered = Registered(adapter="app@v2", version=2, run_id="r", archive="app/ni_1", folder="/f")
    return NightFacts(
        project="app",
        night_id="ni_1",
        date="2026-11-24",
        verdict=judge(delta, evaluated, GATE),
        gate=GATE,
        delta=delta,
        registered=registered,
        evaluated=evaluated,
        adapter_digest="sha256:a",
        base_digest="sha256:b",
        regressions={result.name: regressions(result) for result in families},
        labellers={"ada": 8, "bo": 4},
        cost={"seconds": 100.0, "stage_seconds": {"train": 80.0, "evaluate": 20.0}, "peak_memory_bytes": 2_000_000_000},
        preflight=Preflight(
            spec_path="/s",
            base_digest="sha256:b",
            template_digest="sha256:p",
            checks=("weights whole",),
            warnings=("the disk is slow. Move it.",),
            environment={"driver": "580.1", "device": "NVIDIA H100"},
        ),
        recipe={"method": "sft", "rank": "16", "learning_rate": "0.002"},
        licences={"base": "apache-2.0", "data": ""},
    )


def test_the_decision_comes_first_and_the_numbers_follow(tmp_path: Path) -> None:
    """Heading, reason, next step; then table, margin, labels, people, cost and digests."""
    night = facts(tmp_path)
    assert night.verdict.passed, night.verdict.reason
    text = report(night)
    assert text.startswith("# app@v2: passed the gate, awaiting approval\n")
    for part in (
        "**Why**: the flagged prompts improved",
        "alias `production` of `app` onto version 2",
        "| trained | 12 | 0.0 % | 0.0 % | 100.0 % | 12 | 0 |",
        "Margin 8 points",
        "12 new labels, 3 older ones again, 9 of the base's own answers",
        "ada 8, bo 4",
        "lb_9 left out of training",
        "100 s in all (train 80 s, evaluate 20 s)",
        "sha256:a",
        "Regressions\n\nNone",
    ):
        assert part in text, part


def test_regressions_are_listed_with_both_answers_and_cannot_break_the_table(tmp_path: Path) -> None:
    """A model's answer is text from outside: pipes and tags stay text."""
    night = facts(tmp_path, lost=9)
    assert night.verdict.state is NightState.REJECTED
    text = report(night)
    assert "## Regressions (9)" in text
    assert "| Question good_answers-0? | Oslo \\| the right one | no &lt;b>idea&lt;/b> |" in text
    assert summary(night)["regressions"] == 9
    assert "significant loss in good_answers" in text


def test_the_summary_is_json_with_the_demos_numbers(tmp_path: Path) -> None:
    """What `night show --json` tells; plain JSON, no NaN."""
    told = json.loads(json.dumps(summary(facts(tmp_path, lost=2)), allow_nan=False))
    assert told["fix_rate"] == {"trained": {"before": 0.0, "after": 1.0, "n": 12}}
    assert told["general"] == {"base": 1.0, "current": 1.0, "candidate": 78 / 80, "n": 80}
    assert told["regressions"] == 2
    assert told["mlflow_version"] == "2"


def test_a_score_that_is_no_number_stops_at_the_gate_and_still_has_a_report(tmp_path: Path) -> None:
    """INCONCLUSIVE, not a crash in writing JSON or markdown."""
    night = facts(tmp_path, wrong_score=float("nan"))
    assert night.verdict.state is NightState.INCONCLUSIVE
    assert "incomplete" in report(night)
    json.dumps(summary(night), allow_nan=False)


@pytest.mark.parametrize("damage", ["gone", "cut", "fewer"])
def test_rows_that_are_gone_or_cut_short_do_not_pass(tmp_path: Path, damage: str) -> None:
    """The gate reads the rows, not the summary beside them."""
    night = facts(tmp_path)
    path = Path(night.evaluated.families[1].rows_path)
    if damage == "gone":
        path.unlink()
    elif damage == "cut":
        path.write_bytes(path.read_bytes()[:-40])
    else:
        write_jsonl(path, read_jsonl(path)[:-1])
    assert judge(night.delta, night.evaluated, GATE).state is NightState.INCONCLUSIVE
    regressions(night.evaluated.families[1])


def test_what_must_be_there_is_known_without_the_results(tmp_path: Path) -> None:
    """Counted from the delta and the settings."""
    data = write_data(tmp_path, trained=3, held_out=2, good_answers=4)
    file = tmp_path / "file.jsonl"
    write_jsonl(file, [{"id": "f1", "question": "q", "accept": ["a"]}])
    expected = expected_families(data, GateSettings(held_out_file=file))
    assert expected["trained"] == 3
    assert expected["held_out"] == 3
    assert {"task:nightschool_general", "task:nightschool_choices"} <= set(expected)
    assert expected_families(write_data(tmp_path / "none"), GATE) == {"trained": None}


def test_the_model_card_says_decision_table_and_what_to_do(tmp_path: Path) -> None:
    """Short, since MLflow shows it above the alias that approves."""
    card = model_card(facts(tmp_path), "sha256:e")
    assert card.startswith("**passed the gate")
    assert "| good_answers | 80 |" in card
    assert "move the alias `production`" in card
    assert "Not for production" in model_card(facts(tmp_path, lost=9), "sha256:e")


def test_the_model_card_carries_what_an_audit_asks_for(tmp_path: Path) -> None:
    """Data, licences, method, template, machine; what nobody has named says how to name it."""
    card = model_card(facts(tmp_path), "sha256:e")
    for part in (
        "| base | `sha256:b` |",
        "| licence of the base | apache-2.0 |",
        "| training data | `sha256:d`, 24 rows |",
        "| licence of the data | not named: `projects.data_licence` |",
        "| chat template | `sha256:p` |",
        "| method | method sft, rank 16, learning rate 0.002 |",
        "| trained on | NVIDIA H100 |",
    ):
        assert part in card, part


def test_the_model_card_says_who_approved(tmp_path: Path) -> None:
    """At the top, once, whatever a person wrote as the reason; a roll back adds its own line."""
    card = model_card(facts(tmp_path), "sha256:e")
    at = datetime(2026, 11, 25, 8, 30, tzinfo=UTC)
    forwards = Promotion(project="app", from_adapter="app@v1", to_adapter="app@v2", by="ada", why="looks | <b>", at=at)
    approved = with_switch(card, forwards)
    assert approved.startswith(
        "**Approved** by ada at 2026-11-25 08:30 UTC, instead of `app@v1`: looks \\| &lt;b>.\n\n**passed"
    )
    assert with_switch(approved, forwards) == approved
    back = Promotion(project="app", from_adapter="app@v10", to_adapter="app@v2", by="bo", why="", at=at)
    assert with_switch(approved, back).startswith("**Rolled back to** by bo")


def test_warnings_of_the_preflight_stand_at_the_top(tmp_path: Path) -> None:
    """With their cure; what was looked at has a section of its own, and the next night finds the environment."""
    night = facts(tmp_path)
    text = report(night)
    assert text.index("before training: the disk is slow. Move it.") < text.index("## Before and after")
    assert "## Looked at before training\n\n- weights whole" in text
    assert "| chat template | `sha256:p` |" in text
    assert summary(night)["environment"] == {"driver": "580.1", "device": "NVIDIA H100"}


def test_any_change_of_the_evidence_breaks_its_hash(tmp_path: Path) -> None:
    """Another adapter, data, decision or number: no longer genuine."""
    evidence = build_evidence(facts(tmp_path), "text")
    assert is_genuine(evidence)
    for column, value in {
        "adapter_digest": "sha256:other",
        "current": "app@v9",
        "data_digest": "x",
        "tasks_digest": "x",
        "passed": False,
        "decision": "REJECTED",
        "summary": {**evidence.summary, "regressions": 1},
        "probe": {},
        "night_id": "ni_2",
    }.items():
        assert not is_genuine(Evidence(**{**evidence.model_dump(), column: value})), column
    assert is_genuine(Evidence(**{**evidence.model_dump(), "report": "reworded"}))


async def test_evidence_survives_the_database_and_is_one_a_night(tmp_path: Path) -> None:
    """Written twice it is one row, and what is read back still has its hash."""
    database = Database(f"sqlite+aiosqlite:///{tmp_path}/t.db")
    await database.create_tables()
    night = facts(tmp_path)
    async with database.write() as session:
        session.add(Night(id="ni_1", project="app", date=date(2026, 11, 24), due_at=now()))
    await keep_evidence(database, build_evidence(night, "text"))
    await keep_evidence(database, build_evidence(night, "text"))
    again = build_evidence(facts(tmp_path, lost=9), "text")
    await keep_evidence(database, again)
    async with database.read() as session:
        row = await session.get(Evidence, "ni_1")
    assert row is not None
    assert row.hash == again.hash == evidence_hash(row)
    assert row.passed is False
    await database.close()


def test_families_survive_the_file(tmp_path: Path) -> None:
    """Scores, ids and silence come back as written."""
    silent = [replace(examined(str(n), 1, 1, 0), candidate=Result("  ", 0.0)) for n in range(3)]
    family = read_family(write_family(tmp_path, "task:x", silent))
    assert (family.n, family.lost, family.won, family.silent) == (3, 3, 0, ("candidate",))
    gone = FamilyResult(name="x", n=1, base=0, current=0, candidate=0, lost=0, won=0, rows_path=str(tmp_path / "no"))
    assert read_family(gone).n == 0
