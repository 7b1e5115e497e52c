"""Boundary: a model hub, by huggingface_hub. Lists a repository's files and fetches one at a time, verified.

NoSuchModel     no such repository, revision or file; or a private one, which looks the same
ModelGated      its licence must be accepted first, or the token is refused
HubUnavailable  down, slow, or it broke off; fetching again goes on where it was
WrongDigest     what came is not what the hub lists
"""

from __future__ import annotations

import errno
import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar
from urllib.parse import urlsplit

import httpx
from huggingface_hub import HfApi, constants, hf_hub_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from labeling.errors import InvalidInput, NotFound, Refused, Unavailable
from loop.adapter_files import file_digest
from loop.model_record import licence_of_card

NO_ROOM = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
NOT_A_PART_OF_A_NAME = {"tree", "resolve", "blob", "commit"}


class NoSuchModel(NotFound):
    code: ClassVar[str] = "no_such_model"
    default_hint = "Check the name and the revision. A private one needs HF_TOKEN; another hub HF_ENDPOINT."


class ModelGated(Refused):
    code: ClassVar[str] = "model_gated"
    default_hint = "Accept its licence on the model's page, then set HF_TOKEN to a token of that account."


class HubUnavailable(Unavailable):
    code: ClassVar[str] = "hub_unavailable"
    default_hint = "Run the same command again: files that came whole are kept."


class WrongDigest(Refused):
    code: ClassVar[str] = "wrong_digest"
    default_hint = "The file was removed. Run the same command again; if it happens again, do not trust that hub."


class NoRoom(Unavailable):
    code: ClassVar[str] = "no_room"
    default_hint = "Make room, or name another disk with --to; then the same command goes on where it was."


@dataclass(frozen=True)
class Address:
    """`endpoint` is None for the hub of the environment (HF_ENDPOINT). Only that one ever sees its token."""

    repository: str
    revision: str = "main"
    endpoint: str | None = None


@dataclass(frozen=True)
class RemoteFile:
    """`sha256` is there for large files; small ones are known by git's own digest."""

    name: str
    bytes: int
    sha256: str
    git_sha1: str


@dataclass(frozen=True)
class Listing:
    """One commit of a repository: what is fetched later is what was listed here."""

    address: Address
    commit: str
    files: tuple[RemoteFile, ...]
    licence: str


def address_of(text: str, revision: str | None) -> Address:
    """owner/name, or the page's URL: https://hub/owner/name or .../owner/name/tree/REVISION."""
    parts = urlsplit(text)
    if not parts.scheme:
        return Address(text, revision or "main")
    if parts.scheme not in {"https", "http"} or not parts.netloc or parts.username:
        raise InvalidInput(f"{text!r} is no address of a model", hint="Give owner/name, a page's URL, or a folder.")
    path = [part for part in parts.path.split("/") if part]
    split = next((n for n, part in enumerate(path) if part in NOT_A_PART_OF_A_NAME), len(path))
    endpoint = f"{parts.scheme}://{parts.netloc}"
    return Address(
        repository="/".join(path[:split]),
        revision=revision or "/".join(path[split + 1 :]) or "main",
        endpoint=None if endpoint == constants.ENDPOINT else endpoint,
    )


def hub_url(address: Address) -> str:
    return address.endpoint or str(constants.ENDPOINT)


def list_files(address: Address) -> Listing:
    with _translated(address):
        api = HfApi(endpoint=address.endpoint, token=_token(address))
        info = api.model_info(address.repository, revision=address.revision, files_metadata=True)
    files = tuple(
        RemoteFile(
            name=one.rfilename,
            bytes=one.size or 0,
            sha256=one.lfs.sha256 if one.lfs else "",
            git_sha1=one.blob_id or "",
        )
        for one in info.siblings or []
    )
    card: dict[str, object] = vars(info.card_data) if info.card_data else {}
    return Listing(address, str(info.sha), files, licence_of_card(card))


def fetch(listing: Listing, file: RemoteFile, folder: Path) -> Path:
    """Into `folder`, unless it lies there whole already. Removed again when its digest is wrong."""
    address = listing.address
    target = folder / file.name
    if target.is_file() and _as_listed(target, file):
        return target
    with _translated(address, file.name):
        hf_hub_download(
            address.repository,
            file.name,
            revision=listing.commit,
            local_dir=folder,
            endpoint=address.endpoint,
            token=_token(address),
        )
    if not _as_listed(target, file):
        size = target.stat().st_size
        target.unlink()
        raise WrongDigest(f"{file.name} of {address.repository} is not what {hub_url(address)} lists ({size} bytes)")
    return target


def _as_listed(path: Path, file: RemoteFile) -> bool:
    if path.stat().st_size != file.bytes:
        return False
    if file.sha256:
        return file_digest(path) == f"sha256:{file.sha256}"
    blob = f"blob {file.bytes}\0".encode() + path.read_bytes()  # only small files are listed without a SHA-256
    return hashlib.sha1(blob, usedforsecurity=False).hexdigest() == file.git_sha1


def _token(address: Address) -> bool | None:
    """None: the environment's, for the environment's hub. Never for an address that somebody pasted."""
    return None if address.endpoint is None else False


@contextmanager
def _translated(address: Address, what: str = "") -> Iterator[None]:
    """The vendor's error table. A gated repository is, to its client, also one that is not found: in this order."""
    name = f"{what} of {address.repository}" if what else address.repository
    where = hub_url(address)
    try:
        yield
    except GatedRepoError as error:
        raise ModelGated(f"{name} at {where} is gated") from error
    except RevisionNotFoundError as error:
        raise NoSuchModel(f"{address.repository} at {where} has no revision {address.revision!r}") from error
    except EntryNotFoundError as error:
        if isinstance(error, LocalEntryNotFoundError):  # the hub could not be asked
            raise HubUnavailable(f"{where} could not be asked for {name}: {_first_line(error)}") from error
        raise NoSuchModel(f"{where} lists {name}, but does not have it") from error
    except RepositoryNotFoundError as error:
        raise NoSuchModel(f"there is no model {address.repository!r} at {where}") from error
    except HFValidationError as error:
        raise InvalidInput(
            f"{address.repository!r} is no name of a model", hint="Give owner/name, a page's URL, or a folder."
        ) from error
    except OfflineModeIsEnabled as error:
        raise HubUnavailable(
            f"{name} can't be fetched: HF_HUB_OFFLINE is set",
            hint="Unset it for this command, or give the folder of a copy: `nightschool model fetch DIR`.",
        ) from error
    except HfHubHTTPError as error:
        _by_status(error, name, where)
    except OSError as error:
        if error.errno in NO_ROOM:
            raise NoRoom(f"no room for {name}: {error.strerror}") from error
        raise HubUnavailable(f"{where} broke off {name}: {_first_line(error)}") from error
    except httpx.HTTPError as error:
        raise HubUnavailable(f"{where} broke off {name}: {_first_line(error)}") from error


def _by_status(error: HfHubHTTPError, name: str, where: str) -> None:
    status = error.response.status_code
    if status in {401, 403}:
        raise ModelGated(
            f"{where} refuses our token for {name} ({status})",
            hint="Set HF_TOKEN to a token that is valid and may read this model; unset it for a public one.",
        ) from error
    raise HubUnavailable(f"{where} failed {name} ({status}): {_first_line(error)}") from error


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]
