"""Whatever would make the training useless is found before it starts: the wrong base, no room, an unservable recipe."""

from __future__ import annotations

import shutil
from pathlib import Path

from labeling.errors import Refused
from loop.adapter_files import base_digest
from loop.backends import limits
from loop.outputs import Delta, Preflight
from loop.projects import require_same_base
from loop.settings import ProjectSettings
from loop.stage import StageContext
from loop.start import starting_adapter
from loop.trainers.spec import render, write_spec

SPARE_BYTES = 500_000_000  # logs, evaluation samples and the registry's copy of a small adapter


class PreflightFailed(Refused):
    code = "preflight_failed"


async def run(context: StageContext) -> Preflight:
    delta = context.take(Delta)
    project = context.project
    digest = base_digest(project.base_dir)
    await require_same_base(context.clients, project, digest)
    checks = [
        f"base {project.base_name}: {digest}",
        _rank_servable(project, context.engine.max_lora_rank),
        _room(context.data_dir, project.base_dir),
        *[await _served(context, index, digest) for index in range(len(context.clients.replicas))],
    ]
    checks += backend_can(project, delta)
    start, where = await starting_adapter(context, digest)
    path = context.folder / "spec.json"
    spec = render(
        project.trainer,
        base_dir=project.base_dir.resolve(),
        base_name=project.base_name,
        base_digest=digest,
        data_dir=Path(delta.data_dir),
        out_dir=context.folder / "out",
        method=delta.method,
        start=start,
    )
    write_spec(spec, path)
    checks += [f"method {delta.method}: {delta.method_why}", where]
    return Preflight(spec_path=str(path), base_digest=digest, checks=tuple(checks))


def backend_can(project: ProjectSettings, delta: Delta) -> list[str]:
    """What this backend leaves unused; refused where the outcome would be another than the recipe's."""
    continues = project.trainer.start == "current"
    found = limits(project.trainer, delta.method, continues=continues, replay_rows=delta.base_rows)
    if found.refused:
        reasons, cures = zip(*found.refused, strict=True)
        raise PreflightFailed("; ".join(reasons), hint=" ".join(cures))
    return list(found.told)


def _rank_servable(project: ProjectSettings, max_rank: int) -> str:
    if project.trainer.rank > max_rank:
        raise PreflightFailed(
            f"trainer.rank {project.trainer.rank} is above vLLM's max_lora_rank {max_rank}: it could never be served",
            hint="Lower projects.trainer.rank, or raise vllm.max_lora_rank and start vLLM with it.",
        )
    return f"rank {project.trainer.rank} is servable (at most {max_rank})"


def _room(data_dir: Path, base_dir: Path) -> str:
    """The worst case: two checkpoints with optimizer state and three copies of an adapter, each well below the base."""
    needed = SPARE_BYTES + sum(file.stat().st_size for file in base_dir.glob("*.safetensors"))
    free = shutil.disk_usage(data_dir).free
    if free < needed:
        raise PreflightFailed(
            f"{free / 1e9:.1f} GB free under {data_dir}; a night may need {needed / 1e9:.1f} GB",
            hint="Free disk space or move data_dir, then `nightschool night run --resume`.",
        )
    return f"{free / 1e9:.0f} GB free, {needed / 1e9:.1f} GB needed at worst"


async def _served(context: StageContext, index: int, digest: str) -> str:
    """The replica serves this very base: by name, and by bytes where its folder can be seen from here."""
    replica, name = context.clients.replicas[index], context.project.base_name
    served = {model.name: model for model in await replica.served_models()}
    if name not in served:
        raise PreflightFailed(
            f"{replica.url} does not serve {name!r}; it serves {', '.join(sorted(served)) or 'nothing'}",
            hint="Set projects.base_name to the name that vLLM's --served-model-name gives.",
        )
    folder = Path(served[name].root)
    if not (folder / "config.json").is_file():
        return f"{replica.url} serves {name} (its folder cannot be seen from here: trusted by name)"
    seen = base_digest(folder)
    if seen != digest:
        raise PreflightFailed(
            f"{replica.url} serves {name!r} from {folder}, which is not the model in {context.project.base_dir}",
            hint="Point projects.base_dir at the folder that vLLM serves, or start vLLM from base_dir.",
        )
    return f"{replica.url} serves {name} with the same bytes"
