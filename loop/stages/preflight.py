"""Whatever would make the training useless is found before it starts: the wrong base, no room, an unservable recipe."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path

from labeling.errors import InvalidInput, NightschoolError, Refused
from loop.adapter_files import base_digest
from loop.chat_template import ChatTemplate, chat_template
from loop.digests import write_durably
from loop.machine_memory import this_machine
from loop.memory_record import gib
from loop.outputs import Delta, Preflight
from loop.preflight import base_model, caches, machine, recipe, serving, trainer_environment
from loop.preflight.finding import Finding, PreflightFailed
from loop.preflight.look import Look
from loop.projects import require_same_base
from loop.run_plan import planned
from loop.stage import StageContext
from loop.start import starting_adapter
from loop.trainers.spec import StartSpec, TrainSpec, read_rows, render, write_spec
from loop.training_cures import cures

Check = Callable[[Look], Awaitable[list[Finding]]]

# Seconds first, minutes last. Each reads what an earlier one has left: the tokens to compare come from the audit.
CHECKS: tuple[Check, ...] = (
    base_model.weights,
    base_model.trainable,
    base_model.tokenizer,
    recipe.backend,
    serving.adapter_servable,
    serving.same_base,
    machine.disk_room,
    machine.disk_speed,
    machine.memory,
    machine.cards,
    caches.caches,
    trainer_environment.tokenizer_at_work,
    serving.same_tokens,
    trainer_environment.kernels,
)

# A child process each, or fed by one: of no use once something else has failed.
COSTLY = (trainer_environment.tokenizer_at_work, serving.same_tokens, trainer_environment.kernels)


async def run(context: StageContext) -> Preflight:
    look, where = await _look(context)
    findings: list[Finding] = [Finding(f"base {context.project.base_name}: {look.spec.base_digest}"), Finding(where)]
    findings.append(Finding(f"chat template {look.template.source.name}: {look.template.digest}"))
    failures: list[NightschoolError] = []
    for check in CHECKS:
        context.progress({"doing": f"preflight: {check.__name__.replace('_', ' ')}"})
        if failures and check in COSTLY:
            continue
        try:
            findings += await check(look)
        except (Refused, InvalidInput) as error:
            failures.append(error)
    _all_well(failures)
    findings.append(await _plan_memory(look))
    for finding in findings:
        if finding.cure:
            context.log.warning("preflight", found=finding.text, cure=finding.cure)
    return Preflight(
        spec_path=str(context.folder / "spec.json"),
        base_digest=look.spec.base_digest,
        template_digest=look.template.digest,
        checks=tuple(finding.text for finding in findings if not finding.cure),
        warnings=tuple(f"{finding.text}. {finding.cure}" for finding in findings if finding.cure),
        environment=trainer_environment.environment(look),
    )


def _all_well(failures: list[NightschoolError]) -> None:
    """Every trouble in one go: a night costs a day."""
    if len(failures) == 1:
        raise failures[0]
    if failures:
        told = "; ".join(f"({number}) {error}" for number, error in enumerate(failures, 1))
        cures = " ".join(f"({number}) {error.hint}" for number, error in enumerate(failures, 1) if error.hint)
        raise PreflightFailed(f"{len(failures)} checks failed: {told}", hint=cures)


async def _plan_memory(look: Look) -> Finding:
    """Rewrites the spec with the plans for it. Last: the base is sound, and no other child of ours is on the card."""
    spec, words = await asyncio.to_thread(_memory, look.spec, look.context.project.trainer.backend)
    write_spec(spec, look.context.folder / "spec.json")
    return Finding(words)


def _memory(spec: TrainSpec, backend: str) -> tuple[TrainSpec, str]:
    """The spec with the plans for it, and the first in words."""
    rows, here = read_rows(spec.data_dir, may_be_none=spec.method != "sft"), this_machine(spec.cards.gpus)
    found = planned(spec, backend, rows, here)
    if found.hopeless:
        leanest = found.spec.memory.plans[0]
        what = "a full fine-tune" if spec.finetuning_type == "full" else "training"
        raise PreflightFailed(
            f"{what} needs {gib(leanest.estimated_bytes)} at the least, and may take {gib(leanest.budget_bytes)}",
            hint=f"Each of these would do, in [projects.trainer]: {', or '.join(cures(spec, backend, rows, here))} "
            "(free memory, or raise trainer.memory_budget_gib). `nightschool plan` says what fits.",
        )
    return found.spec, found.words


async def _look(context: StageContext) -> tuple[Look, str]:
    """And from what the training starts, in words."""
    project = context.project
    digest = await asyncio.to_thread(base_digest, project.base_dir)
    await require_same_base(context.clients, project, digest)
    template = chat_template(project.base_dir, project.chat_template)
    if template is None:
        raise PreflightFailed(
            f"{project.base_dir} has no chat template",
            hint="Name a Jinja file in projects.chat_template; managed vLLM and the gate use it too.",
        )
    start, where = await starting_adapter(context, digest)
    spec = _spec(context, digest, template, start)
    write_spec(spec, context.folder / "spec.json")
    return Look(context, spec, template), where


def _spec(context: StageContext, digest: str, template: ChatTemplate, start: StartSpec | None) -> TrainSpec:
    """With a copy of the project's own template: a file edited during the night changes nothing any more."""
    own = None
    if context.project.chat_template is not None:
        own = context.folder / "chat_template.jinja"
        write_durably(own, template.text.encode())
    project, delta = context.project, context.take(Delta)
    return render(
        project.trainer,
        base_dir=project.base_dir.resolve(),
        base_name=project.base_name,
        base_digest=digest,
        data_dir=Path(delta.data_dir),
        out_dir=context.folder / "out",
        chat_template=own,
        template_digest=template.digest,
        method=delta.method,
        start=start,
    )
