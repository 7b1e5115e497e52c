"""The background half: claims nights when due, runs them in turn, polls labels and the registry, reconciles.

Everything it does is also true after a crash: what it had begun stands in the database and is taken up at the start.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from functools import partial

import structlog
from apscheduler.schedulers.asyncio import AsyncIOScheduler
from sqlmodel import col, select

from labeling.errors import NightschoolError
from labeling.retention import forget_old_exchanges
from labeling.sync import LabelSync
from loop import projects, promotion, reconcile, schedule, uncertainty
from loop.runner import Runner
from loop.settings import MlflowSettings, ProjectSettings
from loop.tables import Night, NightState

log = structlog.get_logger()
RECONCILE_SECONDS = 5.0
LOOK_SECONDS = 5.0
RETENTION_SECONDS = 3600.0


@dataclass
class Worker:
    runner: Runner
    mlflow: MlflowSettings
    hook_url: str = ""  # where Label Studio reaches our hooks, "" where it can't
    scheduler: AsyncIOScheduler | None = None
    _syncs: dict[str, LabelSync] = field(default_factory=dict)
    _wakes: list[asyncio.Event] = field(default_factory=list)
    _tasks: set[asyncio.Task[object]] = field(default_factory=set)
    _prepared: set[str] = field(default_factory=set)

    async def start(self) -> None:
        """Prepares the projects and starts the jobs; the first look for nights catches up on the latest missed one."""
        configured = self.runner.projects
        clients = self.runner.clients
        for project in configured.values():
            await self._prepare(project)
            self._syncs[project.name] = LabelSync(
                clients.database, clients.label_studio, project.name, project.labeling, self.hook_url
            )
        every = {
            "registry": (self.mlflow.poll_seconds, self.poll_registry),
            "reconcile": (RECONCILE_SECONDS, self.reconcile),
        }
        for project in configured.values():
            sync = self._syncs[project.name]
            every[f"labels:{project.name}"] = (project.labeling.poll_seconds, sync.round)
            self._spawn(sync.run(), f"label hints of {project.name}")
            looks = project.labeling.selection.look_seconds
            every[f"uncertainty:{project.name}"] = (looks, partial(self.measure_uncertainty, project))
            every[f"retention:{project.name}"] = (RETENTION_SECONDS, partial(self.forget_old, project))
        self.scheduler = schedule.build_scheduler(configured, self._due, every)
        self.scheduler.start()
        self._spawn(self._nights(), "nights")
        self._spawn(self._promotions(), "promotions")

    async def stop(self) -> None:
        if self.scheduler is not None:
            self.scheduler.shutdown(wait=False)
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def wake(self) -> None:
        """There may be a night to run or to promote."""
        for wake in self._wakes:
            wake.set()

    def hint_labels(self, project: str) -> None:
        """Label Studio says that something changed; before the start, and of another's project, nothing is done."""
        if project in self._syncs:
            self._syncs[project].hint()

    async def measure_uncertainty(self, project: ProjectSettings) -> None:
        """In the background, a little at a time; an engine that is away is asked again at the next look."""
        clients = self.runner.clients
        try:
            await uncertainty.measure(clients, project)
            await uncertainty.find_unlikely(clients, project)
        except NightschoolError as error:
            log.info("uncertainty_not_measured", project=project.name, code=error.code, reason=str(error))

    async def forget_old(self, project: ProjectSettings) -> None:
        """Exchanges beyond the project's days; what could not be deleted now is looked at again in an hour."""
        try:
            days = project.labeling.keep_exchanges_days
            await forget_old_exchanges(self.runner.clients.database, project.name, days)
        except NightschoolError as error:
            log.warning("old_exchanges_not_deleted", project=project.name, code=error.code, reason=str(error))

    async def poll_registry(self) -> None:
        for project in self.runner.projects.values():
            try:
                if await self._prepare(project):
                    await self._obey(project)
            except NightschoolError as error:
                log.warning("registry_not_read", project=project.name, code=error.code, reason=str(error))

    async def _obey(self, project: ProjectSettings) -> None:
        request = await promotion.read_request(self.runner.clients, project)
        if isinstance(request, promotion.ApprovalRequest):
            await promotion.approve(self.runner.clients, project, request.night_id, by=request.by, why=request.why)
            self.wake()
        elif isinstance(request, promotion.RollBackRequest):
            await promotion.roll_back(self.runner.clients, project, by=request.by, why=request.why, to=request.to)

    async def reconcile(self) -> None:
        for project in self.runner.projects.values():
            try:
                await reconcile.reconcile(self.runner.clients, project)
            except NightschoolError as error:
                log.warning("replicas_not_reconciled", project=project.name, code=error.code, reason=str(error))

    async def _prepare(self, project: ProjectSettings) -> bool:
        if project.name in self._prepared:
            return True
        try:
            await projects.prepare(self.runner.clients, project)
        except NightschoolError as error:
            log.warning(
                "project_not_prepared", project=project.name, code=error.code, reason=str(error), hint=error.hint
            )
            return False
        self._prepared.add(project.name)
        return True

    async def _due(self, project: ProjectSettings) -> None:
        await schedule.claim_due(self.runner.clients.database, project)
        self.wake()

    async def _nights(self) -> None:
        """Claimed and interrupted nights, the oldest first; a look every few seconds finds other processes' claims."""
        await self._forever(self.runner.examine, NightState.CLAIMED, NightState.RUNNING, before=self._catch_up)

    async def _catch_up(self) -> None:
        """A claim that the database did not take at its due second is made at the next look."""
        for project in self.runner.projects.values():
            await schedule.catch_up(self.runner.clients.database, project)

    async def _promotions(self) -> None:
        """Beside the nights: a promotion must not wait for another project's training."""
        await self._forever(self.runner.promote, NightState.PROMOTING)

    async def _forever(
        self,
        run: Callable[[str], Awaitable[NightState]],
        *states: NightState,
        before: Callable[[], Awaitable[None]] | None = None,
    ) -> None:
        wake = asyncio.Event()
        self._wakes.append(wake)
        while True:
            wake.clear()
            try:
                if before is not None:
                    await before()
                for night_id in await self._waiting(*states):
                    await run(night_id)
            except NightschoolError as error:
                log.warning("nights_not_run", states=states, code=error.code, reason=str(error), hint=error.hint)
            except Exception:  # the edge of a task that nobody awaits: dead, no night would ever run again
                log.exception("nights_not_run", states=states)
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(wake.wait(), timeout=LOOK_SECONDS)

    async def _waiting(self, *states: NightState) -> list[str]:
        async with self.runner.clients.database.read() as session:
            rows = await session.execute(
                select(Night.id)
                .where(col(Night.state).in_(states), col(Night.project).in_(list(self.runner.projects)))
                .order_by(col(Night.due_at), col(Night.created_at))
            )
            return list(rows.scalars())

    def _spawn(self, work: object, name: str) -> None:
        task: asyncio.Task[object] = asyncio.create_task(work, name=name)  # type: ignore[arg-type]  # coroutines only
        self._tasks.add(task)
        task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[object]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and task.exception() is not None:
            log.error("background_task_died", task=task.get_name(), exc_info=task.exception())
