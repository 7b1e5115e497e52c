"""What must hold of every file: nothing of the machine that it was written on, pins for everybody, no secrets."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

from service.settings import load

ROOT = Path(__file__).parent.parent.parent
CONSTRAINTS = sorted(ROOT.glob("deploy/environments/*/constraints.txt"))
SETTINGS = [
    path
    for path in (ROOT / "service" / "commands" / "nightschool.example.toml", *sorted(ROOT.glob("deploy/**/*.toml")))
    if "[[projects]]" in path.read_text(encoding="utf-8")
]
HERE = Path(__file__)
FORBIDDEN = {
    "a path of one machine": re.compile(r"(?<![\w.$}/])/(?:home|root|Users|work|opt)/[\w.]"),
    "a package registry or model hub": re.compile(
        r"(?:pypi|files\.pythonhosted)\.org|download\.pytorch|huggingface\.co"
    ),
    "a private key": re.compile(r"-----BEGIN [A-Z ]*PRIVATE KEY"),
    "a credential": re.compile(
        r"\b(?:AKIA[0-9A-Z]{16}|gh[pousr]_\w{36}|glpat-[\w-]{20}|hf_[A-Za-z]{34}|sk-[\w-]{32})\b"
    ),
    "a password in a URL": re.compile(r"://[^/\s:@{}$<>]+:[^/\s@{}$<>]+@"),
}


def texts() -> dict[str, str]:
    """Every file that git tracks or would add, but this one, which names what it forbids."""
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    paths = [ROOT / line for line in listed.stdout.splitlines()]
    return {
        str(path.relative_to(ROOT)): path.read_text(encoding="utf-8", errors="replace")
        for path in paths
        if path.is_file() and path != HERE
    }


@pytest.mark.parametrize("what", FORBIDDEN)
def test_no_file_holds(what: str) -> None:
    """The lines that do are named."""
    found = [
        f"{name}:{number}: {line.strip()[:100]}"
        for name, text in texts().items()
        for number, line in enumerate(text.splitlines(), 1)
        if FORBIDDEN[what].search(line)
    ]
    assert found == []


@pytest.mark.parametrize("path", CONSTRAINTS, ids=lambda path: path.parent.name)
def test_constraints_are_plain_pins(path: Path) -> None:
    """name==version, nothing built for one machine only: no local version, no file, no address."""
    lines = path.read_text(encoding="utf-8").splitlines()
    assert len(lines) > 50
    assert [line for line in lines if not re.fullmatch(r"[A-Za-z0-9._-]+==[0-9][A-Za-z0-9.]*", line)] == []


@pytest.mark.parametrize("path", SETTINGS, ids=lambda path: path.name)
def test_example_settings_load(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every example is valid, given the secrets that it names."""
    for name in re.findall(r'"env:(\w+)"', path.read_text(encoding="utf-8")):
        monkeypatch.setenv(name, "x")
    load(path)


def test_license_is_the_one_that_the_package_names() -> None:
    """Apache-2.0, whole."""
    text = (ROOT / "LICENSE").read_text(encoding="utf-8")
    assert "Apache License" in text
    assert "END OF TERMS AND CONDITIONS" in text
    assert 'license = "Apache-2.0"' in (ROOT / "pyproject.toml").read_text(encoding="utf-8")


def test_scripts_can_be_run() -> None:
    """What Makefile and CI call is executable."""
    for name in (".ci/run", "deploy/environments/find-python", "deploy/environments/get-uv"):
        assert (ROOT / name).stat().st_mode & 0o111, name
