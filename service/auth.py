"""API keys: 256 random bits, shown once, stored as SHA-256, held in memory so that inference survives the database."""

from __future__ import annotations

import hashlib
import secrets
from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum

from sqlalchemy import update
from sqlalchemy.engine import CursorResult
from sqlmodel import col, select

from labeling.database import Database, new_id, now
from labeling.errors import InvalidInput, NotFound, Refused
from service.tables import ApiKey


class Scope(StrEnum):
    FEEDBACK = "feedback"
    INFERENCE = "inference"
    READ = "read"
    APPROVE = "approve"
    ADMIN = "admin"


class Unauthenticated(Refused):
    code = "unauthenticated"
    default_hint = "Send `Authorization: Bearer ns_...`; `nightschool keys create` makes a key."


class OutOfScope(Refused):
    code = "out_of_scope"
    default_hint = "Use a key that has the scope; `nightschool keys list` shows the scopes of each."


class UnknownScope(InvalidInput):
    code = "unknown_scope"
    default_hint = f"Scopes: {', '.join(Scope)}."


class UnknownKey(NotFound):
    code = "unknown_key"
    default_hint = "`nightschool keys list` shows the ids."


@dataclass(frozen=True, slots=True)
class Caller:
    """Who holds the key of a request. `project` None means every project."""

    key_id: str
    name: str
    scopes: frozenset[str]
    project: str | None

    def may(self, scope: Scope) -> bool:
        return scope in self.scopes or Scope.ADMIN in self.scopes

    def sees(self, project: str) -> bool:
        return self.project is None or self.project == project

    def require(self, scope: Scope, project: str | None = None) -> None:
        if not self.may(scope):
            raise OutOfScope(f"key {self.name!r} lacks scope {scope.value!r}")
        if project is not None and not self.sees(project):
            raise OutOfScope(f"key {self.name!r} belongs to project {self.project!r}, not to {project!r}")


class KeyRing:
    """Callers by the hash of their key. A lookup by the SHA-256 of 256 random bits leaks nothing through its timing."""

    def __init__(self) -> None:
        self._callers: dict[str, Caller] = {}

    async def load(self, database: Database) -> None:
        """After each change of a key, and now and then: another process may have changed one."""
        async with database.read() as session:
            rows = (await session.execute(select(ApiKey).where(col(ApiKey.revoked_at).is_(None)))).scalars().all()
        self._callers = {row.hash: Caller(row.id, row.name, frozenset(row.scopes), row.project) for row in rows}

    def authenticate(self, authorization: str | None) -> Caller:
        """`authorization` is the header's value."""
        scheme, _, key = (authorization or "").partition(" ")
        if scheme.lower() != "bearer" or not key:
            raise Unauthenticated("no API key was sent")
        caller = self._callers.get(_hash(key.strip()))
        if caller is None:
            raise Unauthenticated("the API key is unknown or revoked")
        return caller


async def create_key(
    database: Database, name: str, scopes: Iterable[str], project: str | None = None
) -> tuple[str, str]:
    """(id, key). The key is nowhere to be read again."""
    wanted = sorted(set(scopes))
    unknown = [scope for scope in wanted if scope not in set(Scope)]
    if unknown or not wanted:
        raise UnknownScope(f"key {name!r}: {'no scope given' if not wanted else 'unknown scope ' + ', '.join(unknown)}")
    key = f"ns_{secrets.token_urlsafe(32)}"
    row = ApiKey(id=new_id("key"), name=name, hash=_hash(key), scopes=wanted, project=project)
    async with database.write() as session:
        session.add(row)
    return row.id, key


async def revoke_key(database: Database, key_id: str) -> None:
    """Load the key ring afterwards."""
    statement = update(ApiKey).where(col(ApiKey.id) == key_id, col(ApiKey.revoked_at).is_(None))
    async with database.write() as session:
        result = await session.execute(statement.values(revoked_at=now()))
        assert isinstance(result, CursorResult)
        if result.rowcount != 1:
            raise UnknownKey(f"no key {key_id!r} that is not revoked already")


async def list_keys(database: Database) -> list[ApiKey]:
    async with database.read() as session:
        return list((await session.execute(select(ApiKey).order_by(col(ApiKey.created_at)))).scalars())


def _hash(key: str) -> str:
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).hexdigest()
