"""Where a training starts: the base, or the adapter that serves, if this recipe fits it exactly."""

from __future__ import annotations

from pathlib import Path

from labeling.errors import Refused
from loop.adapter_files import AdapterFiles, check, read_base_config
from loop.plain_lora import AdapterRejected
from loop.settings import LINEAR_LAYERS, ProjectSettings
from loop.stage import StageContext
from loop.tables import Adapter, Serving
from loop.trainers.spec import StartSpec


class CannotContinue(Refused):
    code = "cannot_continue"
    default_hint = 'Set trainer.start = "base", or the recipe to what the serving adapter has.'


async def starting_adapter(context: StageContext, base_digest: str) -> tuple[StartSpec | None, str]:
    """What to start from (None: the base) and why, in words. CannotContinue: the recipe or the files do not fit."""
    project = context.project
    if project.trainer.start == "base":
        return None, "training starts from the base"
    async with context.clients.database.read() as session:
        serving = await session.get(Serving, project.name)
        current = await session.get(Adapter, serving.current) if serving else None
    if current is None or current.folder is None:
        return None, "training starts from the base: no adapter serves yet to go on from"
    if current.base_digest != base_digest:
        raise CannotContinue(f"{current.name} was trained on another base ({current.base_digest})")
    files = _checked(project, current, context.engine.max_lora_rank)
    _same_shape(current.name, files, project)
    start = StartSpec(folder=Path(current.folder), name=current.name, digest=current.digest)
    return start, f"training goes on from {current.name} ({current.digest})"


def _checked(project: ProjectSettings, current: Adapter, max_rank: int) -> AdapterFiles:
    """By the modules of the base, not the recipe's: a difference is to be told as one."""
    assert current.folder is not None
    try:
        files = check(
            Path(current.folder),
            read_base_config(project.base_dir),
            max_rank=max_rank,
            target_modules=LINEAR_LAYERS,
        )
    except AdapterRejected as error:
        raise CannotContinue(f"{current.name} can't be gone on from: {error}") from error
    if files.digest != current.digest:
        raise CannotContinue(f"the files of {current.name} are not those that were registered")
    return files


def _same_shape(name: str, files: AdapterFiles, project: ProjectSettings) -> None:
    recipe = project.trainer
    differ = [
        f"{what} {theirs} there, {ours} here"
        for what, theirs, ours in (
            ("rank", files.rank, recipe.rank),
            ("alpha", files.alpha, float(recipe.alpha)),
            ("target_modules", sorted(files.target_modules), sorted(recipe.target_modules)),
        )
        if theirs != ours
    ]
    if differ:
        raise CannotContinue(f"{name} can't be gone on from with this recipe: {'; '.join(differ)}")
