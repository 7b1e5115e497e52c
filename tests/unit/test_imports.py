"""What a process does not load: the service no torch, the command line's help next to nothing. Fresh interpreters."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

SHOW = "import json, sys; print(json.dumps(sorted(sys.modules)))"
HELP = """
import sys
from service.cli import app
sys.argv = ["nightschool", *sys.argv[1:]]
try:
    app()
except SystemExit as end:
    assert end.code == 0, end.code
"""


def loaded(code: str, *arguments: str) -> set[str]:
    """Modules of a new interpreter after `code`."""
    child = subprocess.run(
        [sys.executable, "-c", f"{code}\n{SHOW}", *arguments], capture_output=True, text=True, check=True
    )
    return set(json.loads(child.stdout.splitlines()[-1]))


@pytest.mark.parametrize("module", ["service.app", "service.commands.up"])
def test_service_process_is_free_of_the_heavy_ones(module: str) -> None:
    """Training, examination and servers run in processes of their own; here they would cost seconds and gigabytes."""
    heavy = {"torch", "transformers", "trl", "peft", "bitsandbytes", "datasets", "vllm", "lm_eval", "unsloth", "ray"}
    assert loaded(f"import {module}") & {*heavy, "mlflow.server"} == set()


@pytest.mark.parametrize("arguments", [["--help"], ["night", "--help"], ["keys", "create", "--help"]])
def test_help_loads_no_vendor(arguments: list[str]) -> None:
    """`nightschool --help` is instant because commands are imported when they run."""
    slow = {"litestar", "sqlalchemy", "sqlmodel", "mlflow", "label_studio_sdk", "httpx", "uvicorn", "numpy"}
    assert loaded(HELP, *arguments) & slow == set()
