"""Runs a night's stages under a lease: resumes what was finished, records what finishes, turns errors into decisions.

The runner alone changes a night's state. A finished stage is a marker row written, with the fencing token checked, in
the transaction that also appends its event; whatever was not marked is done again in a folder of its own.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import structlog
from sqlalchemy import update
from sqlmodel import col, select

from labeling.database import new_id
from labeling.errors import NightschoolError
from loop import held_labels, lease, states
from loop.clients import Clients
from loop.digests import canonical_json, digest_folder, write_durably
from loop.nightly import EXAMINE, PROMOTE
from loop.outputs import Decided, Evaluated, Registered
from loop.settings import EngineSettings, ProjectSettings
from loop.stage import Approval, NightEnds, Stage, StageContext, StageOutput
from loop.tables import Night, NightEvent, NightState, StageMarker
from loop.watch.live import Live

log = structlog.get_logger()
TRAINING = "training"  # the lease that makes it one training run at a time


@dataclass
class Runner:
    clients: Clients
    projects: Mapping[str, ProjectSettings]
    engine: EngineSettings
    data_dir: Path
    holder: str = field(default_factory=lambda: new_id("worker"))
    lease_seconds: float = 30.0
    queue_poll_seconds: float = 1.0
    examine_stages: tuple[Stage, ...] = EXAMINE
    promote_stages: tuple[Stage, ...] = PROMOTE
    live: Live = field(default_factory=Live)

    async def examine(self, night_id: str) -> NightState:
        """EXAMINE of a claimed, failed (resume) or interrupted night; waits while another holds the lease."""
        token = await self._queue(TRAINING)
        async with lease.renewed(self.clients.database, TRAINING, token, self.lease_seconds):
            if not await self._enter(night_id, NightState.RUNNING, (NightState.CLAIMED, NightState.FAILED)):
                return await self._state(night_id)
            async with self.live.kept(self.clients.database, night_id):
                return await self._walk(night_id, self.examine_stages, TRAINING, token)

    async def promote(self, night_id: str) -> NightState:
        """PROMOTE of a night that `approval.begin` moved to `promoting`, also after an interruption."""
        night = await self._night(night_id)
        name = f"promote:{night.project}"
        token = await self._queue(name)
        async with lease.renewed(self.clients.database, name, token, self.lease_seconds):
            if await self._state(night_id) != NightState.PROMOTING:
                return await self._state(night_id)
            async with self.live.kept(self.clients.database, night_id):
                return await self._walk(night_id, self.promote_stages, name, token)

    async def _queue(self, name: str) -> int:
        while True:
            try:
                return await lease.acquire(self.clients.database, name, self.holder, self.lease_seconds)
            except lease.LeaseHeld:
                await asyncio.sleep(self.queue_poll_seconds)

    async def _enter(self, night_id: str, target: NightState, sources: tuple[NightState, ...]) -> bool:
        """Moves into `target`; True also when an interrupted run left it there. False: somebody finished it."""
        state = await self._state(night_id)
        if state in sources:
            async with self.clients.database.write() as session:
                await states.move(session, night_id, target, reason=None, hint=None, finished_at=None)
            return True
        return state == target

    async def _walk(self, night_id: str, stages: tuple[Stage, ...], lease_name: str, token: int) -> NightState:
        night = await self._night(night_id)
        end = partial(self._end, night_id, lease_name, token)
        with structlog.contextvars.bound_contextvars(project=night.project, night=night_id):
            try:
                outputs = await self._finished(night_id)
                for stage in stages:
                    if stage.gives not in outputs:
                        outputs[stage.gives] = await self._run(stage, night, outputs, lease_name, token)
                return await end(*self._outcome(stages, outputs))
            except lease.LeaseLost:
                raise  # the newer holder ends this night
            except NightEnds as ended:
                return await end(ended.state, ended.reason, ended.hint)
            except NightschoolError as error:
                log.error("night_failed", code=error.code, reason=str(error))
                return await end(NightState.FAILED, str(error), error.hint)
            except Exception as error:
                log.exception("night_crashed")
                hint = (
                    "This is a bug in Nightschool; the log has the traceback. `nightschool night run --resume` retries."
                )
                return await end(NightState.FAILED, f"{type(error).__name__}: {error}", hint)

    def _outcome(
        self, stages: tuple[Stage, ...], outputs: dict[type[StageOutput], StageOutput]
    ) -> tuple[NightState, str, str]:
        if stages is self.promote_stages:
            return NightState.PROMOTED, "approved, probed on every replica and switched", ""
        decided = outputs[Decided]
        assert isinstance(decided, Decided)
        return decided.state, decided.reason, decided.hint

    async def _run(
        self,
        stage: Stage,
        night: Night,
        outputs: dict[type[StageOutput], StageOutput],
        lease_name: str,
        token: int,
    ) -> StageOutput:
        folder = self.data_dir / "nights" / night.id / f"{stage.name}.{token}"
        with structlog.contextvars.bound_contextvars(stage=stage.name):
            await self._event(night.id, "stage_started", {"stage": stage.name, "token": token})
            self.live.put(night.id, {"stage": stage.name})
            folder.mkdir(parents=True, exist_ok=True)
            started = time.monotonic()
            context = await self._context(stage, night, folder, outputs)
            output = await stage.run(context)
            assert isinstance(output, stage.gives), f"{stage.name} gave {type(output).__name__}"
            write_durably(folder / "output.json", canonical_json(output.model_dump(mode="json")))
            seconds = time.monotonic() - started
            await self._mark(stage, night.id, output, folder, lease_name, token, seconds)
            log.info("stage_finished", seconds=round(seconds, 1))
            return output

    async def _context(
        self, stage: Stage, night: Night, folder: Path, outputs: dict[type[StageOutput], StageOutput]
    ) -> StageContext:
        fresh = await self._night(night.id)
        approval = Approval(fresh.approved_by, fresh.approved_why or "") if fresh.approved_by else None
        return StageContext(
            night_id=night.id,
            project=self._recipe(night),
            engine=self.engine,
            date=night.date,
            folder=folder,
            data_dir=self.data_dir,
            clients=self.clients,
            log=log.bind(),
            progress=lambda line: self.live.put(night.id, {"stage": stage.name, **line}),
            record=partial(self._event, night.id),
            inputs=dict(outputs),
            approval=approval,
        )

    def _recipe(self, night: Night) -> ProjectSettings:
        """The project's settings with this night's own trainer settings, checked when it was claimed."""
        project = self.projects[night.project]
        return project.model_copy(update={"trainer": project.trainer.with_recipe(night.recipe)})

    async def _mark(
        self,
        stage: Stage,
        night_id: str,
        output: StageOutput,
        folder: Path,
        lease_name: str,
        token: int,
        seconds: float,
    ) -> None:
        """The marker last, and only under the newest token: a stale worker's result is never recorded."""
        digest = await asyncio.to_thread(digest_folder, folder)
        async with self.clients.database.write() as session:
            await lease.require(session, lease_name, token)
            relative = str(folder.relative_to(self.data_dir))
            marker = StageMarker(
                night_id=night_id, stage=stage.name, token=token, folder=relative, digest=digest, seconds=seconds
            )
            await session.merge(marker)
            detail = {"stage": stage.name, "seconds": round(seconds, 3), "digest": digest}
            session.add(NightEvent(night_id=night_id, kind="stage_finished", detail=detail))
            if names := _models_named(output):
                await session.execute(update(Night).where(col(Night.id) == night_id).values(**names))

    async def _finished(self, night_id: str) -> dict[type[StageOutput], StageOutput]:
        """Outputs of marked stages whose files are still what was marked, in order, up to the first that is not."""
        async with self.clients.database.read() as session:
            rows = (await session.execute(select(StageMarker).where(StageMarker.night_id == night_id))).scalars()
            markers = {marker.stage: marker for marker in rows}
        found: dict[type[StageOutput], StageOutput] = {}
        for stage in (*self.examine_stages, *self.promote_stages):
            marker = markers.get(stage.name)
            if marker is None:
                break
            folder = self.data_dir / marker.folder
            if not folder.is_dir() or await asyncio.to_thread(digest_folder, folder) != marker.digest:
                log.warning("stage_files_changed", stage=stage.name, folder=str(folder))
                break
            found[stage.gives] = stage.gives.model_validate_json((folder / "output.json").read_bytes())
        return found

    async def _end(
        self, night_id: str, lease_name: str, token: int, state: NightState, reason: str, hint: str
    ) -> NightState:
        async with self.clients.database.write() as session:
            await lease.require(session, lease_name, token)
            await states.move(session, night_id, state, reason=reason, hint=hint)
            if state == NightState.REJECTED:
                await held_labels.hold(session, night_id)
        log.info("night_ended", night=night_id, state=state, reason=reason)
        return state

    async def _event(self, night_id: str, kind: str, detail: dict[str, Any]) -> None:
        async with self.clients.database.write() as session:
            session.add(NightEvent(night_id=night_id, kind=kind, detail=detail))

    async def _night(self, night_id: str) -> Night:
        async with self.clients.database.read() as session:
            night = await session.get(Night, night_id)
        assert night is not None, night_id
        return night

    async def _state(self, night_id: str) -> NightState:
        return (await self._night(night_id)).state


def _models_named(output: StageOutput) -> dict[str, str]:
    """What a night's row says of its models, as soon as a stage has settled it."""
    match output:
        case Registered():
            return {"candidate": output.adapter}
        case Evaluated():
            return {"current": output.current}
    return {}
