"""`nightschool model`: a base model is fetched once and then lies in a folder, with a record of what it is."""

from __future__ import annotations

import json
from pathlib import Path

from labeling.errors import NotFound
from loop import model_hub
from loop.base_weights import read_weights
from loop.digests import digest_file
from loop.model_fetch import fetch_from_folder, fetch_from_hub, unfit
from loop.model_record import ModelRecord, Source, describe, read_record

DEFAULT = Path("models")


class NoSuchFolder(NotFound):
    code = "no_such_folder"
    default_hint = "Name the folder of a base model; `nightschool model fetch` brings one."


class ChangedSince(model_hub.WrongDigest):
    code = "model_changed"
    default_hint = "Fetch the model again into a new folder, unless the change was yours: then it is another base."


def fetch(what: str, *, to: Path | None, revision: str | None) -> None:
    """`what`: a folder that is there, else a hub's owner/name or URL."""
    origin = Path(what).expanduser()
    if origin.is_dir():
        target = to or DEFAULT / origin.resolve().name
        record = fetch_from_folder(origin, target, _say)
    else:
        address = model_hub.address_of(what, revision)
        target = to or DEFAULT / address.repository.rpartition("/")[2]
        record = fetch_from_hub(model_hub.list_files(address), target, _say)
    print(f"{target} holds the model.")
    _show(record)
    for line in unfit(target, record):
        print(f"warning: {line}")
    print(f'Next: base_dir = "{target}" in nightschool.toml.')


def show(folder: Path, *, as_json: bool, verify: bool) -> None:
    """Of a folder without record, what its files say. `verify` reads every byte of a recorded one."""
    if not folder.is_dir():
        raise NoSuchFolder(f"there is no folder {folder}")
    kept = read_record(folder)
    record = kept or describe(folder, Source(kind="folder", where=str(folder.resolve())))
    read_weights(folder)
    if kept is not None and verify:
        _unchanged(folder, kept)
    if as_json:
        print(json.dumps(record.model_dump(mode="json"), indent=1))
        return
    _show(record)
    if kept is None:
        print("no record here: this is what the files say now")
    for line in unfit(folder, record):
        print(f"warning: {line}")


def _unchanged(folder: Path, record: ModelRecord) -> None:
    changed = [
        name
        for name, kept in record.files.items()
        if not (folder / name).is_file() or digest_file(folder / name) != f"sha256:{kept.sha256}"
    ]
    if changed:
        raise ChangedSince(f"{', '.join(changed)} of {folder} are not what was fetched")


def _show(record: ModelRecord) -> None:
    source = record.source
    where = f"{source.repository} at {source.where}, {source.revision[:12]}" if source.repository else source.where
    lines = {
        "source": where,
        "fetched": record.fetched_at,
        "licence": ", ".join(filter(None, [record.licence or "not named", *record.licence_files])),
        "architecture": f"{record.architecture} ({record.model_type})",
        "parameters": f"{record.parameters:,} in {', '.join(record.dtypes)}",
        "context": f"{record.context_tokens} tokens" if record.context_tokens else "not named",
        "size": f"{sum(file.bytes for file in record.files.values()) / 1e9:.2f} GB in {len(record.files)} files",
        "digest": record.digest,
        "template": record.template_digest or "none",
    }
    for name, value in lines.items():
        print(f"{name:>13}  {value}")


def _say(line: str) -> None:
    print(line, flush=True)
