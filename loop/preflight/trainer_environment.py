"""Two looks into the trainer's own Python environment, as child processes: the tokenizer, and the kernels."""

from __future__ import annotations

import asyncio
from typing import Any

from sqlmodel import col, select

from labeling.errors import NightschoolError, Unavailable
from loop.executors import trainer_caches
from loop.preflight.child_results import Audit, DeviceFacts, Smoke, audit_path, smoke_path
from loop.preflight.finding import Finding, PreflightFailed
from loop.preflight.look import Look
from loop.tables import Evidence, Night

SECONDS_ALLOWED = 1800  # imports take minutes on a busy machine; a broken driver hangs for ever
COMPARED = ("driver", "device", "torch_cuda", "driver_cuda", "python")


async def tokenizer_at_work(look: Look) -> list[Finding]:
    """Raises PreflightFailed with the audit's own words."""
    await _run(look, "loop.trainers.audit", "the tokenizer's audit")
    audit = Audit.model_validate_json(audit_path(look.context.folder).read_bytes())
    cure = "Correct these labels, or confirm that it is meant: as text such a token can't be trained."
    return [
        Finding(
            f"{audit.rows} rows go through the chat template whole, answer and end of turn in the loss "
            f"({', '.join(map(str, audit.stop_ids))})"
        ),
        *[Finding(line) for line in audit.differences],
        *[Finding(line, cure) for line in audit.warnings],
    ]


async def kernels(look: Look) -> list[Finding]:
    """Raises PreflightFailed with the smoke test's own words. Warns of what is not as in the last good night."""
    await _run(look, "loop.trainers.smoke", "the kernels' smoke test")
    smoke = Smoke.model_validate_json(smoke_path(look.context.folder).read_bytes())
    return [Finding(_told(smoke)), *await _changes(look, smoke.facts)]


def environment(look: Look) -> dict[str, str]:
    """What a later night is compared with; empty where the smoke test left nothing."""
    path = smoke_path(look.context.folder)
    return _flat(Smoke.model_validate_json(path.read_bytes()).facts) if path.exists() else {}


async def _run(look: Look, module: str, what: str) -> None:
    context = look.context
    try:
        async with asyncio.timeout(SECONDS_ALLOWED):
            await context.clients.executor.run(
                module,
                context.folder / "spec.json",
                on_progress=_nothing,
                log_path=context.folder / "preflight.log",
                environment=trainer_caches(context.data_dir),
                python=context.project.trainer.python,
            )
    except TimeoutError:
        raise PreflightFailed(
            f"{what} did not end within {SECONDS_ALLOWED} s",
            hint="A GPU that hangs does that: look at `nvidia-smi` and `dmesg`, restart the machine.",
        ) from None
    except Unavailable:
        raise
    except NightschoolError as error:
        raise PreflightFailed(f"{what}: {error}", hint=error.hint) from error


def _nothing(line: dict[str, Any]) -> None:
    """Neither child tells of progress: both are over in seconds."""


def _told(smoke: Smoke) -> str:
    facts = smoke.facts
    packages = ", ".join(f"{name} {version}" for name, version in facts.packages.items())
    if facts.device == "cpu":
        return f"kernels work on the CPU, {smoke.off:.1%} off, {smoke.seconds:.1f} s: {packages}"
    free, held = facts.memory_free_bytes / 2**30, (facts.memory_bytes - facts.memory_free_bytes) / 2**30
    others = f", {held:.1f} held by {', '.join(facts.others)}" if facts.others else ""
    return (
        f"kernels work on {facts.device}, {smoke.off:.1%} off, {smoke.seconds:.1f} s: driver {facts.driver}, "
        f"CUDA {facts.torch_cuda}, {packages}; {free:.1f} GiB free{others}"
    )


async def _changes(look: Look, facts: DeviceFacts) -> list[Finding]:
    known = await _last_good(look)
    if known is None:
        return []
    date, before = known
    changes = [
        f"{name.replace('_', ' ')} {before.get(name) or 'none'} -> {now or 'none'}"
        for name, now in _flat(facts).items()
        if name in before and before[name] != now
    ]
    gone = [f"{name} {was} -> none" for name, was in before.items() if name not in _flat(facts)]
    if not (changes or gone):
        return [Finding(f"driver and packages are those of the last good night, {date}")]
    cure = "If tonight's figures are odd, look here first; to be sure, train a night on the old ones again."
    return [Finding(f"changed since the last good night, {date}: {', '.join([*changes, *gone])}", cure)]


async def _last_good(look: Look) -> tuple[str, dict[str, str]] | None:
    """The newest passed night that recorded its environment."""
    async with look.context.clients.database.read() as session:
        rows = await session.execute(
            select(col(Night.date), col(Evidence.summary))
            .join(Night, col(Night.id) == col(Evidence.night_id))
            .where(col(Night.project) == look.context.project.name, col(Evidence.passed))
            .order_by(col(Evidence.created_at).desc())
            .limit(1)
        )
        found = rows.first()
    if found is None or not found[1].get("environment"):
        return None
    return found[0].isoformat(), found[1]["environment"]


def _flat(facts: DeviceFacts) -> dict[str, str]:
    return {**{name: str(getattr(facts, name)) for name in COMPARED}, **facts.packages}
