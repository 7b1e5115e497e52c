"""Tables of nights, stages, leases, adapters, evidence and promotions."""

from __future__ import annotations

from datetime import date as Date
from datetime import datetime
from enum import StrEnum
from typing import Any

from sqlalchemy import JSON, Column, Index, UniqueConstraint
from sqlmodel import Field, SQLModel

from labeling.database import UtcDateTime, enum_column, new_id, now


def _json(nullable: bool = False) -> Any:
    return Column(JSON, nullable=nullable)


def _time(nullable: bool = False) -> Any:
    return Column(UtcDateTime, nullable=nullable)


class NightState(StrEnum):
    """Upper case: decisions, which end a night (a roll back and a resume aside). `loop.states` has the moves."""

    CLAIMED = "claimed"
    RUNNING = "running"
    AWAITING_APPROVAL = "awaiting_approval"
    PROMOTING = "promoting"
    SKIPPED = "SKIPPED"
    FAILED = "FAILED"
    REJECTED = "REJECTED"
    INCONCLUSIVE = "INCONCLUSIVE"
    REFUSED = "REFUSED"
    EXPIRED = "EXPIRED"
    PROMOTED = "PROMOTED"
    ROLLED_BACK = "ROLLED_BACK"


class Night(SQLModel, table=True):
    """One scheduled run of one project; the unique key is what makes it one a date."""

    __tablename__ = "nights"
    __table_args__ = (UniqueConstraint("project", "date"),)
    id: str = Field(primary_key=True, default_factory=lambda: new_id("ni"))
    project: str = Field(index=True)
    date: Date  # the local date of its due time
    state: NightState = Field(default=NightState.CLAIMED, sa_column=enum_column(NightState))
    reason: str | None = None
    hint: str | None = None
    current: str | None = None  # what served when it was examined
    candidate: str | None = None
    approved_by: str | None = None  # a name, or `mlflow (unattributed)`
    approved_why: str | None = None
    recipe: dict[str, Any] = Field(default_factory=dict, sa_column=_json())  # trainer settings of this night alone
    due_at: datetime = Field(sa_column=_time())
    created_at: datetime = Field(default_factory=now, sa_column=_time())
    finished_at: datetime | None = Field(default=None, sa_column=_time(nullable=True))


class NightEvent(SQLModel, table=True):
    """Append-only; every change of state is one row, written in the same transaction."""

    __tablename__ = "night_events"
    number: int | None = Field(default=None, primary_key=True)
    night_id: str = Field(foreign_key="nights.id", index=True)
    at: datetime = Field(default_factory=now, sa_column=_time())
    kind: str  # state | stage_started | stage_finished | alarm | note
    detail: dict[str, Any] = Field(default_factory=dict, sa_column=_json())


class NightProgress(SQLModel, table=True):
    """The running stage's last line, for whoever watches from another process; rewritten every few seconds."""

    __tablename__ = "night_progress"
    night_id: str = Field(primary_key=True, foreign_key="nights.id")
    at: datetime = Field(default_factory=now, sa_column=_time())
    line: dict[str, Any] = Field(default_factory=dict, sa_column=_json())


class StageMarker(SQLModel, table=True):
    """A finished stage: where its files lie and the digest of its output. Written last, under the fencing token."""

    __tablename__ = "stage_markers"
    night_id: str = Field(primary_key=True, foreign_key="nights.id")
    stage: str = Field(primary_key=True)
    token: int
    folder: str  # relative to the data directory: nights/<id>/<stage>.<token>
    digest: str
    seconds: float
    finished_at: datetime = Field(default_factory=now, sa_column=_time())


class Lease(SQLModel, table=True):
    """One training run at a time. `token` only grows; whoever holds an older one has lost."""

    __tablename__ = "leases"
    name: str = Field(primary_key=True)
    holder: str = ""
    token: int = 0
    expires_at: datetime = Field(sa_column=_time())


class LabelUse(SQLModel, table=True):
    """Which label a night trained on or examined: the lineage from an adapter to its labellers."""

    __tablename__ = "label_uses"
    night_id: str = Field(primary_key=True, foreign_key="nights.id")
    label_id: str = Field(primary_key=True)
    item_id: str
    role: str  # new | replay | held_out
    held: bool = False  # its night was REJECTED: out of training until a person confirms it


class Adapter(SQLModel, table=True):
    """An immutable name and the digest that it stands for, for ever. Version 1 is the base itself (no files)."""

    __tablename__ = "adapters"
    __table_args__ = (UniqueConstraint("project", "version"),)
    name: str = Field(primary_key=True)  # support-bot@v2
    project: str = Field(index=True)
    version: int  # MLflow's
    digest: str
    folder: str | None = None  # absolute, local; None for the base
    archive: str | None = None  # object-store prefix
    base_digest: str
    night_id: str | None = Field(default=None, foreign_key="nights.id")
    created_at: datetime = Field(default_factory=now, sa_column=_time())


class Evidence(SQLModel, table=True):
    """What a decision rests on. `hash` covers every other column but `report` and `created_at`."""

    __tablename__ = "evidence"
    night_id: str = Field(primary_key=True, foreign_key="nights.id")
    hash: str = Field(unique=True)
    adapter: str
    adapter_digest: str
    current: str
    current_digest: str
    base_digest: str
    data_digest: str
    tasks_digest: str
    passed: bool
    decision: str
    summary: dict[str, Any] = Field(sa_column=_json())
    probe: dict[str, Any] = Field(sa_column=_json())  # prompts and log-probabilities that each replica must repeat
    report: str  # markdown
    created_at: datetime = Field(default_factory=now, sa_column=_time())


class Serving(SQLModel, table=True):
    """What each project's alias serves. This row, not MLflow's alias, decides."""

    __tablename__ = "serving"
    project: str = Field(primary_key=True)
    current: str
    previous: str | None = None
    updated_at: datetime = Field(default_factory=now, sa_column=_time())


class Promotion(SQLModel, table=True):
    """One switch of an alias, forwards or back."""

    __tablename__ = "promotions"
    __table_args__ = (Index("ix_promotions_project", "project", "at"),)
    id: str = Field(primary_key=True, default_factory=lambda: new_id("pr"))
    project: str
    from_adapter: str
    to_adapter: str
    by: str  # a name, or `mlflow (unattributed)`
    why: str
    night_id: str | None = None
    told: bool = False  # MLflow's aliases have followed; until then an alias there asks for nothing
    at: datetime = Field(default_factory=now, sa_column=_time())

    @property
    def forwards(self) -> bool:
        """Versions only grow: a switch to an older one is a roll back."""
        return _number(self.to_adapter) > _number(self.from_adapter)


def _number(adapter: str) -> int:
    return int(adapter.rpartition("@v")[2])
