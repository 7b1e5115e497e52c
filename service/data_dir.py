"""The lock on a data directory: one process at a time, and who it is."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import time
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

from labeling.errors import Conflict, InvalidInput

WRITTEN_WITHIN_SECONDS = 2.0


class DataDirInUse(Conflict):
    code = "data_dir_in_use"
    default_hint = (
        "Stop that process, or use it: commands find it by themselves. "
        "A second installation needs a data_dir of its own."
    )


class UnusableDataDir(InvalidInput):
    code = "unusable_data_dir"
    default_hint = "Give data_dir a folder that this user may write to."


@dataclass(frozen=True)
class Holder:
    pid: int
    url: str

    @property
    def serves(self) -> bool:
        """Over HTTP; a command that has the folder for a moment gives no address."""
        return self.url.startswith("http")


class DataDirLock:
    """`with DataDirLock(data_dir, url)`: the kernel frees it however the holder ends, so there are no stale locks."""

    def __init__(self, data_dir: Path, url: str) -> None:
        self.data_dir = data_dir
        self.url = url

    def __enter__(self) -> Self:
        try:
            self.data_dir.mkdir(parents=True, exist_ok=True)
            self._descriptor = os.open(self.data_dir / "lock", os.O_RDWR | os.O_CREAT, 0o644)
        except OSError as error:
            raise UnusableDataDir(f"cannot use data_dir {self.data_dir}: {error.strerror}") from error
        if not _locked_soon(self._descriptor):
            os.close(self._descriptor)
            holder = self.holder(self.data_dir)
            by = f"process {holder.pid} at {holder.url}" if holder else "another process"
            raise DataDirInUse(f"{self.data_dir} is in use by {by}")
        self._write(json.dumps({"pid": os.getpid(), "url": self.url}))
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._write("")
        os.close(self._descriptor)

    @staticmethod
    def holder(data_dir: Path) -> Holder | None:
        """Who has it now; None while nobody does."""
        try:
            descriptor = os.open(data_dir / "lock", os.O_RDONLY)
        except FileNotFoundError:
            return None
        except OSError as error:
            raise UnusableDataDir(f"cannot use data_dir {data_dir}: {error.strerror}") from error
        try:
            deadline = time.monotonic() + WRITTEN_WITHIN_SECONDS
            while not _locked(descriptor, fcntl.LOCK_SH):
                with contextlib.suppress(ValueError):  # taken, but its holder has not written yet
                    return Holder(**json.loads(os.pread(descriptor, 4096, 0)))
                if time.monotonic() > deadline:
                    return Holder(pid=0, url="")
                time.sleep(0.01)
            return None
        finally:
            os.close(descriptor)

    def _write(self, text: str) -> None:
        os.ftruncate(self._descriptor, 0)
        os.pwrite(self._descriptor, text.encode(), 0)


def _locked_soon(descriptor: int) -> bool:
    """Whoever only asks for the holder has the lock for an instant, too."""
    deadline = time.monotonic() + 0.3
    while not _locked(descriptor, fcntl.LOCK_EX):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.01)
    return True


def _locked(descriptor: int, kind: int) -> bool:
    try:
        fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
