"""The gate's decision on what was measured, with report and evidence; when passed, the alias `candidate` is set."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from pathlib import Path

from sqlmodel import col, select

from labeling.tables import Label
from loop.cost import night_cost
from loop.digests import canonical_json, write_durably
from loop.evidence import build_evidence, keep_evidence
from loop.examination import exam_families
from loop.family_rows import read_family, regressions
from loop.gate import GateVerdict, decide, flagged
from loop.lm_eval import tasks_of
from loop.model_card import model_card
from loop.model_record import licence
from loop.outputs import Decided, Delta, Evaluated, Preflight, Registered, Trained
from loop.report import NightFacts, report
from loop.settings import GateSettings
from loop.stage import StageContext
from loop.tables import Adapter, LabelUse, StageMarker
from loop.trainers.spec import read_spec


async def run(context: StageContext) -> Decided:
    facts = await _facts(context)
    text = report(facts)
    evidence = build_evidence(facts, text)
    report_path = context.folder / "report.md"
    write_durably(report_path, text.encode())
    write_durably(context.folder / "report.json", canonical_json(evidence.summary))
    await keep_evidence(context.clients.database, evidence)
    await context.clients.objects.put_folder(f"{facts.registered.archive}/report", context.folder)
    await _tell_registry(context, facts, evidence.hash, report_path)
    verdict = facts.verdict
    return Decided(
        state=verdict.state,
        reason=verdict.reason,
        hint=verdict.hint,
        evidence_hash=evidence.hash,
        report_path=str(report_path),
    )


def judge(delta: Delta, evaluated: Evaluated, gate: GateSettings) -> GateVerdict:
    """From the rows on disk; what should be there is read from the delta and the settings, not from the results."""
    return decide(
        [read_family(result) for result in evaluated.families],
        expected_families(Path(delta.data_dir), gate),
        applied=evaluated.applied,
        seconds_an_answer=evaluated.seconds_an_answer,
        settings=gate,
    )


def expected_families(data_dir: Path, gate: GateSettings) -> dict[str, int | None]:
    """Family -> its number of items; None for a project's own lm-eval tasks, which the child process counts itself."""
    asked: Mapping[str, int | None] = {name: len(items) for name, items in exam_families(data_dir, gate).items()}
    return {"trained": None, **asked, **{f"task:{task.name}": None for task in tasks_of(gate)}}


async def _facts(context: StageContext) -> NightFacts:
    delta, trained, evaluated = context.take(Delta), context.take(Trained), context.take(Evaluated)
    registered, preflight = context.take(Registered), context.take(Preflight)
    gate = context.project.gate
    verdict = judge(delta, evaluated, gate)
    return NightFacts(
        project=context.project.name,
        night_id=context.night_id,
        date=context.date.isoformat(),
        verdict=verdict,
        gate=gate,
        delta=delta,
        registered=registered,
        evaluated=evaluated,
        adapter_digest=trained.adapter_digest,
        base_digest=await _base_digest(context, registered.adapter),
        regressions={result.name: regressions(result) for result in evaluated.families},
        labellers=await _labellers(context),
        cost=night_cost(
            await _stage_seconds(context),
            trained.result,
            trained.watched,
            rates=context.project.cost,
            engine_on_gpu=context.engine.device == "cuda" and context.engine.examination == "own",
            labels=delta.label_rows,
            fixed=sum(line.won for line in flagged(verdict.families)),
        ),
        preflight=preflight,
        recipe=_recipe(context, trained),
        licences={"base": licence(context.project.base_dir), "data": context.project.data_licence},
        training={**trained.result, **trained.watched},
    )


def _recipe(context: StageContext, trained: Trained) -> dict[str, str]:
    """How it was trained, in the words of the settings."""
    spec = read_spec(Path(context.take(Preflight).spec_path))
    return {
        "method": spec.method,
        "backend": context.project.trainer.backend,
        "finetuning_type": spec.finetuning_type,
        "quantisation": spec.quantisation,
        "rank": str(spec.lora.rank),
        "alpha": f"{spec.lora.alpha:g}",
        "modules": ", ".join(spec.lora.target_modules),
        "learning_rate": f"{spec.schedule.learning_rate:g}",
        "steps": str(trained.result.get("steps", "")),
        "seed": str(spec.seed),
    }


async def _base_digest(context: StageContext, adapter: str) -> str:
    async with context.clients.database.read() as session:
        row = await session.get(Adapter, adapter)
    assert row is not None, adapter
    return row.base_digest


async def _labellers(context: StageContext) -> dict[str, int]:
    """Annotator -> how many of the labels trained on are theirs."""
    async with context.clients.database.read() as session:
        rows = await session.execute(
            select(Label.annotators)
            .join(LabelUse, col(LabelUse.label_id) == col(Label.id))
            .where(col(LabelUse.night_id) == context.night_id, col(LabelUse.role) != "held_out")
        )
        return dict(Counter(name for annotators in rows.scalars() for name in annotators))


async def _stage_seconds(context: StageContext) -> dict[str, float]:
    async with context.clients.database.read() as session:
        rows = await session.execute(
            select(StageMarker)
            .where(col(StageMarker.night_id) == context.night_id)
            .order_by(col(StageMarker.finished_at))
        )
        return {marker.stage: marker.seconds for marker in rows.scalars()}


async def _tell_registry(context: StageContext, facts: NightFacts, evidence_hash: str, report_path: Path) -> None:
    """Tags and description for every decision; the alias last, and only when passed: it is what asks for approval."""
    registry, project, version = context.clients.registry, facts.project, facts.registered.version
    tags = {"nightschool.decision": facts.verdict.state.value, "nightschool.evidence": evidence_hash}
    await registry.set_tags(project, version, tags)
    await registry.set_description(project, version, model_card(facts, evidence_hash))
    await registry.log_files(facts.registered.run_id, report_path, "report")
    await registry.finish_run(facts.registered.run_id, tags=tags)
    if facts.verdict.passed:
        await registry.set_alias(project, "candidate", version)
