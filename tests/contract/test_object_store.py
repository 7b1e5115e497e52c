"""The archive's contract, over a local folder and over a server that speaks S3."""

from __future__ import annotations

import os
import secrets
from pathlib import Path
from typing import Any

import pytest

from loop.digests import digest_file
from loop.object_store import (
    MANIFEST,
    BadKey,
    FolderBlobs,
    ObjectDamaged,
    ObjectMissing,
    ObjectStore,
    ObjectStoreRefused,
    ObjectStoreUnavailable,
    open_store,
)
from loop.settings import ObjectStoreSettings


def s3_settings(server: Any, **changed: Any) -> ObjectStoreSettings:
    keys = {"access_key": server.access_key, "secret_key": server.secret_key}
    bucket = f"bucket-{secrets.token_hex(4)}"
    return ObjectStoreSettings.model_validate(
        {"kind": "s3", "endpoint": server.endpoint, "secure": False, "bucket": bucket, **keys, **changed}
    )


@pytest.fixture(params=["folder", "s3"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> ObjectStore:
    if request.param == "folder":
        return open_store(ObjectStoreSettings(), tmp_path / "archive")
    return open_store(s3_settings(request.getfixturevalue("s3_server")), tmp_path / "unused")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "adapter"
    (folder / "sub").mkdir(parents=True)
    (folder / "weights.bin").write_bytes(os.urandom(6_000_000))  # above the 5 MiB of one S3 part
    (folder / "sub" / "ä b.json").write_text("{}")
    (folder / "empty").touch()
    return folder


def relative_names(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


async def test_a_folder_comes_back_as_it_was(store: ObjectStore, folder: Path, tmp_path: Path) -> None:
    """Every byte, names of any letters, and the same digest both ways; a second time is harmless."""
    put = await store.put_folder("bot/night/adapter", folder)
    assert await store.put_folder("bot/night/adapter", folder) == put
    assert await store.get_folder("bot/night/adapter", tmp_path / "back") == put
    names = relative_names(folder)
    assert relative_names(tmp_path / "back") == names
    assert all(digest_file(folder / name) == digest_file(tmp_path / "back" / name) for name in names)
    assert await store.list("bot/night") == sorted(f"bot/night/adapter/{name}" for name in [*names, MANIFEST])


async def test_other_bytes_have_another_digest(store: ObjectStore, folder: Path) -> None:
    """The manifest's digest stands for the whole folder."""
    first = await store.put_folder("a", folder)
    (folder / "empty").write_text("x")
    assert await store.put_folder("a", folder) != first


async def test_what_was_not_archived_whole_is_not_there(store: ObjectStore, folder: Path, tmp_path: Path) -> None:
    """The manifest is written last: an upload cut short leaves objects, but no folder."""
    await store.put_bytes("bot/night/adapter/weights.bin", b"half")
    assert not await store.exists("bot/night/adapter")
    with pytest.raises(ObjectMissing):
        await store.get_folder("bot/night/adapter", tmp_path / "back")
    await store.put_folder("bot/night/adapter", folder)
    assert await store.exists("bot/night/adapter")
    assert not await store.exists("bot/night")


async def test_damage_is_seen(store: ObjectStore, folder: Path, tmp_path: Path) -> None:
    """What comes back is compared with the manifest."""
    await store.put_folder("a", folder)
    await store.put_bytes("a/empty", b"not empty")
    with pytest.raises(ObjectDamaged, match="a/empty"):
        await store.get_folder("a", tmp_path / "back")
    assert not (tmp_path / "back" / "empty").exists()


async def test_bytes_come_back(store: ObjectStore) -> None:
    """Overwriting gives the newer ones; an empty object is an object."""
    await store.put_bytes("report.md", b"one")
    await store.put_bytes("report.md", b"two")
    await store.put_bytes("nothing", b"")
    assert (await store.get_bytes("report.md"), await store.get_bytes("nothing")) == (b"two", b"")


async def test_what_is_missing_is_said(store: ObjectStore) -> None:
    """An empty store has no keys and no objects, and that is no failure of the store."""
    assert await store.list("nowhere") == []
    with pytest.raises(ObjectMissing, match="nowhere"):
        await store.get_bytes("nowhere")


@pytest.mark.parametrize("key", ["", "/etc/passwd", "../x", "a/../../x", "a//b", "a\\b", "./a"])
async def test_keys_stay_inside(store: ObjectStore, key: str) -> None:
    """No key leaves the archive, whoever made it."""
    with pytest.raises(BadKey):
        await store.put_bytes(key, b"x")


async def test_a_folder_that_would_hide_the_manifest_is_refused(store: ObjectStore, folder: Path) -> None:
    """Its name is the archive's own."""
    (folder / MANIFEST).write_text("{}")
    with pytest.raises(BadKey, match=MANIFEST):
        await store.put_folder("a", folder)


async def test_a_link_out_of_the_folder_is_not_followed(store: ObjectStore, folder: Path) -> None:
    """Otherwise any file of this machine could end in the archive."""
    (folder / "link").symlink_to("/etc/hostname")
    await store.put_folder("a", folder)
    assert "a/link" not in await store.list("a")


async def test_an_unreachable_server_is_unavailable(s3_server: Any) -> None:
    """Within seconds, retryable, and with the address."""
    store = open_store(s3_settings(s3_server, endpoint="127.0.0.1:1"), Path("unused"))
    with pytest.raises(ObjectStoreUnavailable, match=r"127\.0\.0\.1:1"):
        await store.check()


async def test_what_the_server_forbids_is_refused(s3_server: Any) -> None:
    """A bucket name that S3 does not allow: settings are wrong, trying again will not help."""
    store = open_store(s3_settings(s3_server, bucket="nightschool..bucket"), Path("unused"))
    with pytest.raises(ObjectStoreRefused, match=r"nightschool\.\.bucket"):
        await store.check()
    with pytest.raises(ObjectStoreRefused, match="endpoint"):
        open_store(s3_settings(s3_server, endpoint="http://host/path"), Path("unused"))


async def test_a_full_or_unwritable_folder_is_unavailable(tmp_path: Path) -> None:
    """Here a file stands where a folder is needed; nothing half written is left."""
    (tmp_path / "archive").mkdir()
    (tmp_path / "archive" / "bot").write_text("a file")
    store = ObjectStore(FolderBlobs(tmp_path / "archive"))
    with pytest.raises(ObjectStoreUnavailable, match="bot/x"):
        await store.put_bytes("bot/x", b"x")
    assert await store.list() == ["bot"]
