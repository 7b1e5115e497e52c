"""Keys: shown once, stored as a hash, scoped, revocable; the ring in memory outlives the database."""

from __future__ import annotations

import base64
import hashlib

import pytest

from labeling.database import Database
from service.app import assemble, create_app
from service.auth import (
    Caller,
    KeyRing,
    OutOfScope,
    Scope,
    Unauthenticated,
    UnknownKey,
    UnknownScope,
    create_key,
    list_keys,
    revoke_key,
)
from service.routes.keys import key_routes
from service.tables import ApiKey
from tests.running import Service, rows, serving, settings_for


async def test_key_is_shown_once_and_stored_as_hash(database: Database) -> None:
    """256 bits behind `ns_`; the table knows only their SHA-256."""
    key_id, key = await create_key(database, "app", ["feedback", "inference"], "bot")
    assert key.startswith("ns_")
    assert len(base64.urlsafe_b64decode(key[3:] + "=")) == 32
    (row,) = await rows(database, ApiKey)
    assert (row.id, row.hash) == (key_id, hashlib.sha256(key.encode()).hexdigest())
    assert key[3:] not in repr(row)
    assert [listed.name for listed in await list_keys(database)] == ["app"]


async def test_ring_knows_whose_key_it_is(database: Database) -> None:
    """The caller has the key's scopes and project; the header's scheme is not case-sensitive."""
    _, key = await create_key(database, "app", ["feedback"], "bot")
    ring = KeyRing()
    with pytest.raises(Unauthenticated):
        ring.authenticate(f"Bearer {key}")
    await ring.load(database)
    caller = ring.authenticate(f"bearer {key}")
    assert (caller.name, caller.project, caller.scopes) == ("app", "bot", frozenset({"feedback"}))


@pytest.mark.parametrize("header", [None, "", "Bearer", "Bearer ", "Basic abc", "Bearer ns_wrong", "Bearer \xff\udcff"])
async def test_wrong_headers(database: Database, header: str | None) -> None:
    await create_key(database, "app", ["admin"])
    ring = KeyRing()
    await ring.load(database)
    with pytest.raises(Unauthenticated):
        ring.authenticate(header)


async def test_revoked_key_is_out_at_the_next_load(database: Database) -> None:
    """And cannot be revoked twice; an unknown id is told."""
    key_id, key = await create_key(database, "app", ["read"])
    await revoke_key(database, key_id)
    ring = KeyRing()
    await ring.load(database)
    with pytest.raises(Unauthenticated):
        ring.authenticate(f"Bearer {key}")
    for unknown in (key_id, "key_none"):
        with pytest.raises(UnknownKey):
            await revoke_key(database, unknown)


@pytest.mark.parametrize("scopes", [[], ["root"], ["read", "write"]])
async def test_unknown_scopes_make_no_key(database: Database, scopes: list[str]) -> None:
    with pytest.raises(UnknownScope):
        await create_key(database, "app", scopes)
    assert await rows(database, ApiKey) == []


def test_scopes_and_projects() -> None:
    """A scope is needed, admin is all of them; a project's key reaches no other project."""
    reporter = Caller("k", "app", frozenset({"feedback"}), "bot")
    reporter.require(Scope.FEEDBACK, "bot")
    for scope, project in ((Scope.READ, "bot"), (Scope.FEEDBACK, "other"), (Scope.ADMIN, None)):
        with pytest.raises(OutOfScope):
            reporter.require(scope, project)
    admin = Caller("k", "ops", frozenset({"admin"}), None)
    for scope in Scope:
        admin.require(scope, "anything")


async def test_a_projects_admin_reaches_its_own_keys_only(database: Database) -> None:
    """It can neither make a key of every project, nor see or end another project's."""
    names = ("one", "two")
    settings = settings_for([], projects=names)
    state = assemble(settings, database)
    operator, _ = await create_key(database, "operator", ["admin"])
    routes = key_routes(database, state.keys, names)
    async with (
        serving(create_app(settings, state, extra_routes=routes)) as url,
        await Service(url, settings, state).client("admin", project="one") as client,
    ):
        for project in (None, "two"):
            wanted = {"name": "more", "scopes": ["admin"], "project": project}
            assert (await client.post("/v1/keys", json=wanted)).status_code == 403
        made = await client.post("/v1/keys", json={"name": "app", "scopes": ["feedback"], "project": "one"})
        assert made.status_code == 201, made.text
        assert {row["project"] for row in (await client.get("/v1/keys")).json()} == {"one"}
        assert (await client.delete(f"/v1/keys/{operator}")).status_code == 403
        assert (await client.delete(f"/v1/keys/{made.json()['id']}")).status_code == 200
