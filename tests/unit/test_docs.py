"""The docs say what the code does: drawn parts are current, named commands and files exist."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from typer.main import get_command

from labeling.entry import OWN_RULES
from labeling.reporters import PREFIX
from service.cli import app
from service.transfer.reading import ELSEWHERE, LANGFUSE, TENSORZERO
from tests.render_docs import BLOCKS, ROOT, rendered

PAGES = sorted([*(ROOT / "docs").rglob("*.md"), ROOT / "README.md", ROOT / "CHANGELOG.md"])


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_drawn_parts_are_current(page: Path) -> None:
    """`python -m tests.render_docs` would change nothing."""
    text = page.read_text(encoding="utf-8")
    assert rendered(text) == text


def test_every_drawn_part_stands_somewhere() -> None:
    """A block that no page shows would be compared with nothing."""
    text = "".join(page.read_text(encoding="utf-8") for page in PAGES)
    for name, draw in BLOCKS.items():
        assert draw() in text, name


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_named_commands_exist(page: Path) -> None:
    """Every `nightschool …` in code marks is a command of the command line."""
    commands = get_command(app).commands  # type: ignore[attr-defined]
    for words in re.findall(r"nightschool ((?:[a-z]+ ?)+)", " ".join(re.findall(r"`([^`]+)`", page.read_text()))):
        first, *rest = words.split()
        assert first in commands, f"{page.name}: nightschool {words}"
        inner = getattr(commands[first], "commands", None)
        if inner and rest:
            assert rest[0] in inner, f"{page.name}: nightschool {words}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_and_named_files_exist(page: Path) -> None:
    """Relative links resolve, and files of the three folders that a page names are there."""
    text = page.read_text(encoding="utf-8")
    for target in re.findall(r"\]\((?!https?:)([^)#]+)", text):
        assert (page.parent / target).exists(), f"{page.name} links to {target}"
    for named in re.findall(r"`((?:service|loop|labeling|tests|deploy)/[\w./-]+)`", text):
        assert (ROOT / named).exists(), f"{page.name} names {named}"


def test_every_prefix_of_an_id_is_listed() -> None:
    """Beside those that `new_id` is asked for, those of what imports and we ourselves say; no two are the same."""
    sources = [path.read_text() for folder in ("labeling", "loop", "service") for path in (ROOT / folder).rglob("*.py")]
    made = {f"{prefix}_" for text in sources for prefix in re.findall(r'new_id\("(\w+)"\)', text)} - {"c_"}  # a bench's
    hashed = [*OWN_RULES, TENSORZERO, LANGFUSE, ELSEWHERE, PREFIX, "gq_"]
    assert len(made | set(hashed)) == len(made) + len(hashed)
    page = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    first_cells = re.findall(r"^\| (`[^|]*) \|", page.partition("## Ids")[2].partition("\n## ")[0], re.MULTILINE)
    listed = [prefix for cell in first_cells for prefix in re.findall(r"`(\w+_)`", cell)]
    assert sorted(listed) == sorted(made | set(hashed))
