"""One process a data directory; everybody else learns who."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from service.data_dir import DataDirInUse, DataDirLock, Holder

HOLD = """
import sys, time
from pathlib import Path
from service.data_dir import DataDirLock
with DataDirLock(Path(sys.argv[1]), "http://127.0.0.1:1"):
    print("held", flush=True)
    time.sleep(60)
"""


def test_second_process_is_refused_and_told_who_holds_it(tmp_path: Path) -> None:
    """The error names process and address; SIGKILL frees the lock at once."""
    other = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert other.stdout is not None
    assert other.stdout.readline() == "held\n"
    assert DataDirLock.holder(tmp_path) == Holder(other.pid, "http://127.0.0.1:1")
    with pytest.raises(DataDirInUse, match=f"in use by process {other.pid} at http://127.0.0.1:1"):
        DataDirLock(tmp_path, "http://127.0.0.1:2").__enter__()
    other.kill()
    other.wait()
    assert DataDirLock.holder(tmp_path) is None
    with DataDirLock(tmp_path, "http://127.0.0.1:2"):
        assert DataDirLock.holder(tmp_path) == Holder(os.getpid(), "http://127.0.0.1:2")


def test_nobody_holds_a_folder_that_is_not_there(tmp_path: Path) -> None:
    """Asking creates nothing."""
    assert DataDirLock.holder(tmp_path / "none") is None
    assert not (tmp_path / "none").exists()


def test_released_is_free(tmp_path: Path) -> None:
    """The same process may take it again; missing folders are made."""
    for _ in range(2):
        with DataDirLock(tmp_path / "a" / "b", "x"):
            pass
    assert DataDirLock.holder(tmp_path / "a" / "b") is None
