"""`nightschool init`: a commented nightschool.toml that loads as it stands."""

from __future__ import annotations

from pathlib import Path

from labeling.errors import Conflict, InvalidInput

EXAMPLE = Path(__file__).parent / "nightschool.example.toml"


class AlreadyThere(Conflict):
    code = "settings_already_there"
    default_hint = "Use --force to overwrite it, or name another folder."


class CannotWrite(InvalidInput):
    code = "cannot_write"
    default_hint = "Name a folder that you may write to."


def run(folder: Path, *, force: bool) -> None:
    target = folder / "nightschool.toml"
    if target.exists() and not force:
        raise AlreadyThere(f"{target} exists already")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        target.write_text(EXAMPLE.read_text(encoding="utf-8"), encoding="utf-8")
    except OSError as error:
        raise CannotWrite(f"cannot write {target}: {error.strerror}") from error
    print(f"Wrote {target}. Next: set base_dir in it, then `nightschool doctor` and `nightschool up`.")
