"""The labelling screen over there is this release's, unless a person has changed it: theirs is kept while it can work.

Annotations stay whatever happens. After an upgrade the open tasks get the fields that the new screen shows.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from xml.etree import ElementTree

import structlog
from sqlalchemy import update
from sqlmodel import col, select

from labeling.database import Database
from labeling.label_studio import LabelStudioServer
from labeling.labeling_screen import SCREEN
from labeling.new_tasks import as_tasks
from labeling.tables import ItemState, LabellingProject, ReviewItem

log = structlog.get_logger(__name__)
NEEDED = {"verdict": "Choices", "correction": "TextArea"}  # without these nothing that comes back is a label
CURE = "`nightschool labels screen --restore` puts ours back; no annotation is lost by it."
ITEMS_AT_A_TIME = 50


def digest(screen: str) -> str:
    """Whatever the white space."""
    return hashlib.sha256(" ".join(screen.split()).encode()).hexdigest()[:16]


OURS = digest(SCREEN)
FORMER = frozenset(("814e98ad020716e9",))  # of earlier releases, which recorded none


class ScreenState(StrEnum):
    OURS = "ours"
    UPDATED = "updated"  # an earlier release's, replaced just now
    CHANGED = "changed by hand"
    UNUSABLE = "unusable"


@dataclass(frozen=True)
class Screen:
    state: ScreenState
    missing: tuple[str, ...] = ()

    @property
    def detail(self) -> str:
        if self.missing:
            return f"the labelling screen lacks {', '.join(self.missing)}: what people submit can't become labels"
        return f"the labelling screen is {self.state}"

    @property
    def cure(self) -> str:
        return CURE if self.state in (ScreenState.CHANGED, ScreenState.UNUSABLE) else ""


def look(there: str, written: str | None) -> Screen:
    """`written`: the digest of what we wrote last, where that is known."""
    now_there = digest(there)
    if now_there == OURS:
        return Screen(ScreenState.OURS)
    if now_there == written or now_there in FORMER:
        return Screen(ScreenState.UPDATED)
    missing = tuple(f"{tag} {name!r}" for name, tag in NEEDED.items() if not _has(there, name, tag))
    return Screen(ScreenState.UNUSABLE if missing else ScreenState.CHANGED, missing)


def _has(screen: str, name: str, tag: str) -> bool:
    try:
        root = ElementTree.fromstring(screen)  # noqa: S314  # from the operator's own server, which has parsed it
    except ElementTree.ParseError:
        return False
    return any(element.get("name") == name for element in root.iter(tag))


def is_settled(row: LabellingProject) -> bool:
    """This release has looked already: the sweep is soon enough to look again."""
    return row.screen in (OURS, f"theirs {OURS}")


async def keep_screen(
    database: Database, server: LabelStudioServer, row: LabellingProject, *, restore: bool = False
) -> Screen:
    """`restore`: also over a person's changes."""
    found = look(await server.screen(row.server_project), row.screen)
    if found.state is ScreenState.UPDATED or (restore and found.state is not ScreenState.OURS):
        await server.set_screen(row.server_project, SCREEN)
        await refresh_tasks(database, server, row)
        found = Screen(ScreenState.UPDATED)
        log.info("labelling_screen_updated", project=row.project)
    if found.state is ScreenState.UNUSABLE:
        log.error("labelling_screen_unusable", project=row.project, lacks=found.missing, cure=CURE)
    elif found.state is ScreenState.CHANGED:
        log.warning("labelling_screen_changed_by_hand", project=row.project, consequence="kept", cure=CURE)
    now_known = f"theirs {OURS}" if found.cure else OURS
    if row.screen != now_known:
        same = (col(LabellingProject.project) == row.project) & (
            col(LabellingProject.server_project) == row.server_project
        )
        async with database.write() as session:
            await session.execute(update(LabellingProject).where(same).values(screen=now_known))
    return found


async def refresh_tasks(database: Database, server: LabelStudioServer, row: LabellingProject) -> int:
    """Open tasks get what the screen shows now; how many."""
    async with database.read() as session:
        waiting = select(ReviewItem).where(
            col(ReviewItem.project) == row.project,
            col(ReviewItem.state).in_((ItemState.PUSHED, ItemState.DISPUTED)),
            col(ReviewItem.task_id).is_not(None),
        )
        items = list((await session.execute(waiting.order_by(col(ReviewItem.id)))).scalars())
    refreshed = 0
    for start in range(0, len(items), ITEMS_AT_A_TIME):
        refreshed += await _refresh(database, server, row.server_project, items[start : start + ITEMS_AT_A_TIME])
    return refreshed


async def _refresh(database: Database, server: LabelStudioServer, project: int, items: Sequence[ReviewItem]) -> int:
    wanted = await as_tasks(database, items)
    outdated = [
        (task.id, wanted[item_id])
        for item_id, tasks in (await server.find_tasks(project, wanted)).items()
        for task in tasks
        if task.shown != wanted[item_id].shown
    ]
    for task_id, task in outdated:
        await server.show(task_id, task)
    return len(outdated)
