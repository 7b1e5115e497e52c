"""The exam: base, current and candidate on one engine; flagged prompts, good answers, lm-eval tasks, time an answer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from labeling.errors import Conflict
from loop.chat_template import require_same_template, tokenizer_folder
from loop.digests import digest_json
from loop.evaluation_cache import EvaluationCache
from loop.examination import Examiner, Models, exam_families, write_tasks
from loop.examination_engine import examination_engine
from loop.lm_eval import Harness, Served, run_tasks, tasks_digest_parts, tasks_of
from loop.outputs import Delta, Evaluated, FamilyResult, Preflight, Registered
from loop.probe import take_probe
from loop.stage import StageContext
from loop.tables import Adapter, Serving
from loop.vllm import Replica


class NothingServes(Conflict):
    code = "nothing_serves"
    default_hint = "Start the service once: it prepares each project."


async def run(context: StageContext) -> Evaluated:
    require_same_template(context.project, context.take(Preflight).template_digest)
    current, candidate = await _rows(context)
    models = _models(context, current, candidate)
    async with examination_engine(context) as replica:
        for row in (current, candidate):
            if row.folder is not None:
                await replica.load(row.name, Path(row.folder))
        try:
            return await _examine(context, replica, models, current)
        finally:
            if context.engine.examination == "replica":  # not left registered there: promotion loads it anew
                await replica.unload(candidate.name)


async def _examine(context: StageContext, replica: Replica, models: Models, current: Adapter) -> Evaluated:
    context.progress({"doing": "probing log-probabilities"})
    probe = await take_probe(replica, models.base.name, models.candidate.name)
    families: tuple[FamilyResult, ...] = ()
    seconds: dict[str, float] = {}
    if probe.applied:  # else there is nothing to examine, and the gate says so
        families, seconds = await _families(context, replica, models)
    return Evaluated(
        current=current.name,
        current_digest=current.digest,
        families=families,
        tasks_digest=_exam_digest(context),
        probe=probe.model_dump(mode="json"),
        applied=probe.applied,
        seconds_an_answer=seconds,
    )


async def _families(
    context: StageContext, replica: Replica, models: Models
) -> tuple[tuple[FamilyResult, ...], dict[str, float]]:
    items = exam_families(Path(context.take(Delta).data_dir), context.project.gate)
    engine = _engine_key(context, models.base.digest, await replica.version())
    examiner = _examiner(context, replica, models, engine)
    results = examiner.write(context.folder, items, await examiner.ask(items))
    context.progress({"doing": "lm-eval"})
    results += await _tasks(context, replica, models, engine)
    context.progress({"doing": "timing answers"})
    return results, await examiner.seconds_an_answer(items)


async def _rows(context: StageContext) -> tuple[Adapter, Adapter]:
    """What serves now, and the night's candidate."""
    async with context.clients.database.read() as session:
        serving = await session.get(Serving, context.project.name)
        current = await session.get(Adapter, serving.current) if serving else None
        candidate = await session.get(Adapter, context.take(Registered).adapter)
    if current is None or candidate is None:
        raise NothingServes(f"project {context.project.name!r} has no serving model to compare with")
    return current, candidate


def _models(context: StageContext, current: Adapter, candidate: Adapter) -> Models:
    project = context.project
    return Models(
        base=Served(project.base_name, candidate.base_digest),
        current=Served(project.served_name(current.name), current.digest),
        candidate=Served(candidate.name, candidate.digest),
    )


def _examiner(context: StageContext, replica: Replica, models: Models, engine: dict[str, Any]) -> Examiner:
    return Examiner(
        replica=replica,
        models=models,
        gate=context.project.gate,
        cache=EvaluationCache(context.data_dir),
        engine=engine,
        concurrency=context.engine.max_num_seqs,
        progress=context.progress,
    )


def _engine_key(context: StageContext, base_digest: str, version: str) -> dict[str, Any]:
    """What of the engine can change an answer; the base's digest covers its own template."""
    engine, own = context.engine, context.project.chat_template
    template = {"chat_template": context.take(Preflight).template_digest} if own else {}
    return {
        **template,
        "version": version,
        "base": base_digest,
        "device": engine.device,
        "dtype": engine.dtype,
        "max_model_len": engine.max_model_len,
        "extra_args": list(engine.extra_args),
    }


async def _tasks(
    context: StageContext, replica: Replica, models: Models, engine: dict[str, Any]
) -> tuple[FamilyResult, ...]:
    tasks = tasks_of(context.project.gate)
    if not tasks:
        return ()
    folder = context.folder / "lm_eval"
    folder.mkdir(exist_ok=True)
    key = context.engine.api_key
    harness = Harness(
        executor=context.clients.executor,
        cache=EvaluationCache(context.data_dir),
        url=replica.url,
        api_key=key.get_secret_value() if key else "",
        base_dir=tokenizer_folder(
            context.project.base_dir, context.project.chat_template, context.folder / "tokenizer"
        ),
        base_digest=models.base.digest,
        engine=engine,
        max_length=context.engine.max_model_len,
        folder=folder,
    )
    rows = await run_tasks(harness, tasks, models.distinct())
    return write_tasks(context.folder, models, [task.name for task in tasks], rows)


def _exam_digest(context: StageContext) -> str:
    """Of every question and of how it is scored."""
    gate = context.project.gate
    families = exam_families(Path(context.take(Delta).data_dir), gate)
    return digest_json(
        {
            "items": {name: [item.model_dump() for item in items] for name, items in families.items()},
            "tasks": tasks_digest_parts(tasks_of(gate)),
            "gate": gate.model_dump(mode="json", exclude={"held_out_file", "tasks"}),
        }
    )
