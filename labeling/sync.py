"""One project's round: feedback folded, tasks pushed, annotations pulled. By the clock, and at once after a hint.

A hint, such as Label Studio's webhook, is only a reason to look: lost, doubled or forged it changes no result.
"""

from __future__ import annotations

import asyncio
import time

import structlog

from labeling.database import Database
from labeling.errors import NightschoolError
from labeling.feedback import fold
from labeling.label_studio import LabelStudioServer
from labeling.label_studio_webhook import keep_webhook
from labeling.labelling_projects import labelling_project
from labeling.pull import pull
from labeling.push import push
from labeling.settings import LabelingSettings

log = structlog.get_logger(__name__)
# Hints that come meanwhile are one: however fast people click, so many looks a second at most.
BETWEEN_LOOKS_SECONDS = 0.5
# A server may tell of a change before it has committed it: without a find, a second look follows.
SECOND_LOOK_SECONDS = 1.0


class LabelSync:
    """`our_url`: where Label Studio reaches our hooks; "" where it can't. `run` is to be awaited as a task."""

    def __init__(
        self, database: Database, server: LabelStudioServer, project: str, settings: LabelingSettings, our_url: str = ""
    ) -> None:
        self.project = project
        self._database, self._server, self._settings, self._our_url = database, server, settings, our_url
        self._hinted = asyncio.Event()
        self._registered_in: int | None = None

    def hint(self) -> None:
        self._hinted.set()

    async def round(self) -> None:
        """An outside system that is down is tried again at the next."""
        try:
            await fold(self._database, self.project, self._settings)
            await push(self._database, self._server, self.project, self._settings)
            report = await pull(self._database, self._server, self.project, self._settings)
            if report.reopened or report.replaced:
                await push(self._database, self._server, self.project, self._settings)
            await self._register(again=report.swept)
        except NightschoolError as error:
            log.warning("labels_not_synced", project=self.project, code=error.code, reason=str(error), hint=error.hint)

    async def run(self) -> None:
        """Looks after hints, for ever."""
        while True:
            await self._hinted.wait()
            started = time.monotonic()
            await self._look()
            # A server that answers slowly is asked more rarely.
            await asyncio.sleep(max(BETWEEN_LOOKS_SECONDS, time.monotonic() - started))

    async def _look(self) -> None:
        self._hinted.clear()
        try:
            if await self._found_some():
                return
            await asyncio.sleep(SECOND_LOOK_SECONDS)
            self._hinted.clear()
            await self._found_some()
        except NightschoolError as error:
            log.warning("hint_not_followed", project=self.project, code=error.code, reason=str(error))
        except Exception:  # the edge of a task that nobody awaits: dead, hints would be lost until the restart
            log.exception("hint_not_followed", project=self.project)

    async def _found_some(self) -> bool:
        """Without a sweep, which may take longer than anybody wants to wait."""
        report = await pull(self._database, self._server, self.project, self._settings, sweep=False)
        return report.annotations > 0

    async def _register(self, *, again: bool) -> None:
        """Once, in a project that was made anew, and `again` now and then: people may have deleted the webhook."""
        target = await labelling_project(self._database, self._server, self.project, self._settings)
        if target.server_project != self._registered_in or again:
            await keep_webhook(self._server, target.server_project, self.project, self._our_url)
            self._registered_in = target.server_project
