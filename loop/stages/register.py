"""Gives the adapter its immutable name: a version in MLflow, a copy in the archive, files where replicas find them."""

from __future__ import annotations

from pathlib import Path

from labeling.database import insert_or_nothing
from labeling.errors import Conflict
from loop.adapter_files import install
from loop.outputs import Delta, Preflight, Registered, Trained
from loop.stage import StageContext
from loop.tables import Adapter


class NameTaken(Conflict):
    """An immutable name stands for one digest for ever; old KV-cache blocks would answer otherwise (vllm#42125)."""

    code = "adapter_name_taken"


async def run(context: StageContext) -> Registered:
    delta, trained, preflight = context.take(Delta), context.take(Trained), context.take(Preflight)
    project, clients = context.project, context.clients
    adapter_dir = Path(trained.adapter_dir)
    version = await clients.registry.register(
        project.name,
        trained.run_id,
        adapter_dir,
        night_id=context.night_id,
        tags={
            "nightschool.kind": "adapter",
            "nightschool.night": context.night_id,
            "nightschool.adapter_digest": trained.adapter_digest,
            "nightschool.data_digest": delta.digest,
            "nightschool.base_digest": preflight.base_digest,
            "nightschool.template_digest": preflight.template_digest or "not recorded",
        },
    )
    name = f"{project.name}@v{version}"
    folder = install(adapter_dir, context.data_dir / "adapters", name, digest=trained.adapter_digest)
    archive = f"{project.name}/{context.night_id}"
    await clients.objects.put_folder(f"{archive}/adapter", adapter_dir)
    await clients.objects.put_folder(f"{archive}/data", Path(delta.data_dir))
    await _record(context, name, version, trained.adapter_digest, preflight.base_digest, archive, folder)
    return Registered(adapter=name, version=version, run_id=trained.run_id, archive=archive, folder=str(folder))


async def _record(
    context: StageContext, name: str, version: int, digest: str, base: str, archive: str, folder: Path
) -> None:
    async with context.clients.database.write() as session:
        row = Adapter(
            name=name,
            project=context.project.name,
            version=version,
            digest=digest,
            folder=str(folder),
            archive=archive,
            base_digest=base,
            night_id=context.night_id,
        )
        await session.execute(insert_or_nothing(session, row))
        kept = await session.get(Adapter, name)
        if kept is None or kept.digest != digest:
            raise NameTaken(
                f"{name} already stands for other bytes",
                hint="MLflow's registry was restored or reset: delete that version there and resume the night.",
            )
