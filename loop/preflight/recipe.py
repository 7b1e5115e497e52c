"""Whether the backend can train this night's data by the project's recipe."""

from __future__ import annotations

from loop.backends import limits
from loop.outputs import Delta
from loop.preflight.finding import Finding, PreflightFailed
from loop.preflight.look import Look
from loop.settings import ProjectSettings


async def backend(look: Look) -> list[Finding]:
    delta = look.context.take(Delta)
    return [Finding(f"method {delta.method}: {delta.method_why}"), *backend_can(look.context.project, delta)]


def backend_can(project: ProjectSettings, delta: Delta) -> list[Finding]:
    """What this backend leaves unused; refused where the outcome would be another than the recipe's."""
    continues = project.trainer.start == "current"
    found = limits(project.trainer, delta.method, continues=continues, replay_rows=delta.base_rows)
    if found.refused:
        reasons, cures = zip(*found.refused, strict=True)
        raise PreflightFailed("; ".join(reasons), hint=" ".join(cures))
    return [Finding(told) for told in found.told]
