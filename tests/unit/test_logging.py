"""JSON lines with what is bound to the night, for our own records and the libraries' alike."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

PROGRAM = """
import logging, structlog
from service.logging import configure
configure(json=True)
secret = "hunter2"
with structlog.contextvars.bound_contextvars(project="bot", night="ni_1", stage="train"):
    structlog.get_logger("ours").info("started", rows=3)
    logging.getLogger("library").warning("careful %s", 1)
    try:
        1 / 0
    except ZeroDivisionError:
        structlog.get_logger("ours").exception("failed")
logging.getLogger("httpx").info("chatter")
"""


def test_lines_are_json_and_carry_the_night() -> None:
    """One object a line on stderr; tracebacks show no local variables; chatty libraries are quiet."""
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True, cwd=root)
    started, careful, failed = map(json.loads, done.stderr.splitlines())
    for line in (started, careful, failed):
        assert (line["project"], line["night"], line["stage"]) == ("bot", "ni_1", "train")
    assert (started["event"], started["rows"], started["level"]) == ("started", 3, "info")
    assert (careful["event"], careful["logger"]) == ("careful 1", "library")
    assert "ZeroDivisionError" in failed["exception"]
    assert done.stdout == ""
    assert "hunter2" not in done.stderr.replace(PROGRAM, "")
