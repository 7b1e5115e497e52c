"""What a stage is: a frozen record of a name, the outputs that it needs, the output that it gives and a function.

A stage writes only into its own folder, never calls another stage and never changes the night's state:
`loop.runner` does.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from datetime import date as Date
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict
from structlog.stdlib import BoundLogger

from labeling.errors import Conflict
from loop.clients import Clients
from loop.settings import EngineSettings, ProjectSettings
from loop.tables import NightState

T = TypeVar("T", bound="StageOutput")


class StageFilesGone(Conflict):
    code = "stage_files_gone"
    default_hint = "Put the night's folder back from a backup, or run the next night; what serves stays."


class StageOutput(BaseModel):
    """Serialised as output.json in the stage's folder; paths inside are absolute strings under the data directory."""

    model_config = ConfigDict(frozen=True, extra="forbid")


@dataclass(frozen=True)
class Approval:
    by: str
    why: str


async def _unrecorded(kind: str, detail: dict[str, Any]) -> None:
    return


@dataclass(frozen=True)
class StageContext:
    """All that a stage may use. `folder` is its own, empty, already there."""

    night_id: str
    project: ProjectSettings
    engine: EngineSettings
    date: Date
    folder: Path
    data_dir: Path
    clients: Clients
    log: BoundLogger
    progress: Callable[[dict[str, Any]], None]  # shown live and kept in memory only
    inputs: dict[type[StageOutput], StageOutput]
    approval: Approval | None = None  # there in PROMOTE stages
    record: Callable[[str, dict[str, Any]], Awaitable[None]] = _unrecorded  # kind and detail of an event of the night

    def take(self, kind: type[T]) -> T:
        """An earlier stage's output, by its type. StageFilesGone: its files were removed or changed since."""
        found = self.inputs.get(kind)
        if found is None:
            where = self.data_dir / "nights" / self.night_id
            raise StageFilesGone(f"what an earlier stage left in {where} was removed or changed: no {kind.__name__}")
        assert isinstance(found, kind)
        return found


@dataclass(frozen=True)
class Stage:
    name: str
    needs: tuple[type[StageOutput], ...]
    gives: type[StageOutput]
    run: Callable[[StageContext], Awaitable[StageOutput]]


class NightEnds(Exception):
    """Raised by a stage to end the night with a decision that is no failure (SKIPPED, EXPIRED)."""

    def __init__(self, state: NightState, reason: str, hint: str = "") -> None:
        super().__init__(reason)
        self.state, self.reason, self.hint = state, reason, hint
