"""Tables of the HTTP side: API keys and remembered answers to idempotent requests."""

from __future__ import annotations

from datetime import datetime
from typing import Any

from sqlalchemy import JSON, Column
from sqlmodel import Field, SQLModel

from labeling.database import UtcDateTime, now


class ApiKey(SQLModel, table=True):
    """Only the SHA-256 of a key is kept. `project` None means every project."""

    __tablename__ = "api_keys"
    id: str = Field(primary_key=True)
    name: str
    hash: str = Field(unique=True)
    scopes: list[str] = Field(sa_column=Column(JSON, nullable=False))
    project: str | None = None
    created_at: datetime = Field(default_factory=now, sa_column=Column(UtcDateTime, nullable=False))
    revoked_at: datetime | None = Field(default=None, sa_column=Column(UtcDateTime, nullable=True))


class IdempotentAnswer(SQLModel, table=True):
    """The first answer to an Idempotency-Key of an API key, with the digest of the body that it answered."""

    __tablename__ = "idempotent_answers"
    key_id: str = Field(primary_key=True)
    idempotency_key: str = Field(primary_key=True)
    body_digest: str
    status: int
    answer: dict[str, Any] = Field(sa_column=Column(JSON, nullable=False))
    created_at: datetime = Field(default_factory=now, sa_column=Column(UtcDateTime, nullable=False))
