"""Boundary: the archive of data, adapters and reports. A local folder, or any server that speaks S3 (minio's SDK).

A folder is archived under a prefix with `manifest.json` written last: without it, the folder is not there.
"""

from __future__ import annotations

import asyncio
import io
import json
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import BinaryIO, ClassVar, Protocol

import urllib3
from minio import Minio
from minio.error import InvalidResponseError, S3Error, ServerError

from labeling.errors import InvalidInput, NotFound, Refused, Unavailable
from loop.digests import canonical_json, digest_bytes, digest_file, sync_folder
from loop.settings import ObjectStoreSettings

MANIFEST = "manifest.json"
TEMPORARY = ".tmp"
S3_RETRIES = 2
S3_TRANSIENT = frozenset({"InternalError", "ServiceUnavailable", "SlowDown", "RequestTimeout", "OperationAborted"})


class ObjectStoreUnavailable(Unavailable):
    code: ClassVar[str] = "object_store_unavailable"
    default_hint = "Check the object store and its free space; the night can be resumed."


class ObjectStoreRefused(Refused):
    code: ClassVar[str] = "object_store_refused"
    default_hint = "Check bucket, keys and rights under [object_store]."


class ObjectMissing(NotFound):
    code: ClassVar[str] = "object_missing"


class ObjectDamaged(Refused):
    """What came back is not what was put there."""

    code: ClassVar[str] = "object_damaged"
    default_hint = "Restore it from a backup of the object store."


class BadKey(InvalidInput):
    code: ClassVar[str] = "bad_object_key"


class Blobs(Protocol):
    """One kind of store, blocking; keys are relative POSIX paths, already checked."""

    def put(self, key: str, data: bytes) -> None: ...

    def put_file(self, key: str, path: Path) -> None: ...

    def get(self, key: str) -> bytes: ...

    def keys(self, prefix: str) -> list[str]: ...


class ObjectStore:
    def __init__(self, blobs: Blobs) -> None:
        self._blobs = blobs

    async def put_folder(self, prefix: str, folder: Path) -> str:
        """Every file under `folder`, then the manifest; gives the manifest's digest. Doing it twice is harmless."""
        return await asyncio.to_thread(self._put_folder, prefix, folder)

    async def get_folder(self, prefix: str, folder: Path) -> str:
        """Back into an empty or new `folder`, every digest checked; gives the manifest's digest."""
        return await asyncio.to_thread(self._get_folder, prefix, folder)

    async def put_bytes(self, key: str, data: bytes) -> str:
        """Gives the digest."""
        await asyncio.to_thread(self._blobs.put, _checked(key), data)
        return digest_bytes(data)

    async def get_bytes(self, key: str) -> bytes:
        """ObjectMissing when there is none."""
        return await asyncio.to_thread(self._blobs.get, _checked(key))

    async def exists(self, prefix: str) -> bool:
        """Whether a folder was archived whole."""
        return f"{prefix}/{MANIFEST}" in await self.list(prefix)

    async def list(self, prefix: str = "") -> list[str]:
        """Keys of all objects under a folder, sorted."""
        return sorted(await asyncio.to_thread(self._blobs.keys, _checked(prefix) if prefix else ""))

    async def check(self) -> None:
        """Reachable, and writable by us."""
        await self.put_bytes(".nightschool", b"writable\n")

    def _put_folder(self, prefix: str, folder: Path) -> str:
        files = sorted(path for path in folder.rglob("*") if path.is_file() and not path.is_symlink())
        if folder / MANIFEST in files:
            raise BadKey(f"{folder} holds a {MANIFEST} of its own; that name is the archive's")
        digests: dict[str, str] = {}
        for path in files:
            name = path.relative_to(folder).as_posix()
            self._blobs.put_file(_checked(f"{prefix}/{name}"), path)
            digests[name] = digest_file(path)
        manifest = canonical_json({"files": digests})
        self._blobs.put(_checked(f"{prefix}/{MANIFEST}"), manifest)
        return digest_bytes(manifest)

    def _get_folder(self, prefix: str, folder: Path) -> str:
        manifest = self._blobs.get(_checked(f"{prefix}/{MANIFEST}"))
        for name, digest in json.loads(manifest)["files"].items():
            data = self._blobs.get(_checked(f"{prefix}/{name}"))
            if digest_bytes(data) != digest:
                raise ObjectDamaged(f"{prefix}/{name} is not what was archived ({digest[:19]}…)")
            target = folder / _checked(name)
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(data)
        return digest_bytes(manifest)


def open_store(settings: ObjectStoreSettings, archive_dir: Path) -> ObjectStore:
    """`archive_dir` is used by kind = "folder"."""
    return ObjectStore(S3Blobs(settings) if settings.kind == "s3" else FolderBlobs(archive_dir))


class FolderBlobs:
    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def put(self, key: str, data: bytes) -> None:
        self._write(key, io.BytesIO(data))

    def put_file(self, key: str, path: Path) -> None:
        with path.open("rb") as source:
            self._write(key, source)

    def get(self, key: str) -> bytes:
        with _folder_errors(key):
            return (self._folder / key).read_bytes()

    def keys(self, prefix: str) -> list[str]:
        with _folder_errors(prefix):
            paths = (self._folder / prefix).rglob("*")
            return [p.relative_to(self._folder).as_posix() for p in paths if p.is_file() and not _is_temporary(p)]

    def _write(self, key: str, source: BinaryIO) -> None:
        """Temporary name, fsync, rename, fsync of the folder: whole or not there."""
        target = self._folder / key
        temporary = target.with_name(f".{target.name}.{secrets.token_hex(4)}{TEMPORARY}")
        with _folder_errors(key):
            target.parent.mkdir(parents=True, exist_ok=True)
            try:
                with temporary.open("wb") as file:
                    shutil.copyfileobj(source, file)
                    file.flush()
                    os.fsync(file.fileno())
                temporary.replace(target)
            finally:
                temporary.unlink(missing_ok=True)
            sync_folder(target.parent)


class S3Blobs:
    """The bucket is made when missing, at the first write."""

    def __init__(self, settings: ObjectStoreSettings) -> None:
        assert settings.access_key is not None
        assert settings.secret_key is not None
        self._where = f"{settings.endpoint}/{settings.bucket}"
        self._bucket, self._region = settings.bucket, settings.region
        self._bucket_is_there = False
        # The SDK's own default waits five minutes, six times over.
        patience = urllib3.PoolManager(
            timeout=urllib3.Timeout(connect=5, read=60), retries=urllib3.Retry(S3_RETRIES, backoff_factor=0.2)
        )
        try:
            self._s3 = Minio(
                settings.endpoint,
                access_key=settings.access_key.get_secret_value(),
                secret_key=settings.secret_key.get_secret_value(),
                secure=settings.secure,
                region=settings.region,
                http_client=patience,
            )
        except ValueError as error:
            raise ObjectStoreRefused(f"object_store.endpoint {settings.endpoint!r}: {error}") from error

    def put(self, key: str, data: bytes) -> None:
        with self._errors(key):
            self._ensure_bucket()
            self._s3.put_object(self._bucket, key, io.BytesIO(data), len(data))

    def put_file(self, key: str, path: Path) -> None:
        with self._errors(key):
            self._ensure_bucket()
            self._s3.fput_object(self._bucket, key, str(path))

    def get(self, key: str) -> bytes:
        with self._errors(key):
            response = self._s3.get_object(self._bucket, key)
            try:
                return bytes(response.read())
            finally:
                response.close()
                response.release_conn()

    def keys(self, prefix: str) -> list[str]:
        under = f"{prefix}/" if prefix else ""
        with self._errors(prefix):
            if not self._s3.bucket_exists(self._bucket):
                return []
            return [found.object_name for found in self._s3.list_objects(self._bucket, under, recursive=True)]

    def _ensure_bucket(self) -> None:
        if not self._bucket_is_there and not self._s3.bucket_exists(self._bucket):
            self._s3.make_bucket(self._bucket, self._region)
        self._bucket_is_there = True

    @contextmanager
    def _errors(self, key: str) -> Iterator[None]:
        """The vendor's error table."""
        try:
            yield
        except S3Error as error:
            if error.code in {"NoSuchKey", "NoSuchBucket"}:
                raise ObjectMissing(f"{self._where} holds no {key!r}") from error
            if error.code in S3_TRANSIENT:
                raise ObjectStoreUnavailable(f"{self._where} failed for {key!r}: {error.code}") from error
            raise ObjectStoreRefused(f"{self._where} refused {key!r}: {error.code} {error.message}") from error
        except ValueError as error:  # the SDK's own check of the bucket's name
            raise ObjectStoreRefused(f"{self._where}: {error}") from error
        except (urllib3.exceptions.HTTPError, InvalidResponseError, ServerError, OSError) as error:
            raise ObjectStoreUnavailable(f"{self._where} failed for {key!r}: {error}") from error


@contextmanager
def _folder_errors(key: str) -> Iterator[None]:
    try:
        yield
    except FileNotFoundError as error:
        raise ObjectMissing(f"the archive holds no {key!r}") from error
    except OSError as error:
        raise ObjectStoreUnavailable(f"the archive failed for {key!r}: {error.strerror}") from error


def _is_temporary(path: Path) -> bool:
    return path.name.startswith(".") and path.name.endswith(TEMPORARY)


def _checked(key: str) -> str:
    parts = PurePosixPath(key).parts
    if not key or key.startswith("/") or ".." in parts or "\\" in key or "/".join(parts) != key:
        raise BadKey(f"{key!r} is no key of the archive: relative, with / between names")
    return key
