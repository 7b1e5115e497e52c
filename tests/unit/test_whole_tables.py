"""Reports on narrow terminals."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from service.commands.whole_tables import WholeMarkdown

ROW = "| task:nightschool_general | 103 | 100.0 % | 99.0 % | 100.0 % | 1 | 0 | 1 | (2.5) |"
HEAD = "| family | n | base | current | candidate | newly right | newly wrong | p (loss) | loss at most |"


@pytest.mark.parametrize("width", [60, 80, 160])
def test_no_name_of_a_family_is_cut(width: int) -> None:
    """At any width its letters are all there, in order, in the first column."""
    file = io.StringIO()
    rule = "|---" * 9 + "|"
    Console(file=file, width=width).print(WholeMarkdown(f"{HEAD}\n{rule}\n{ROW}\n"))
    text = file.getvalue()
    assert "…" not in text
    shown = "".join(line.strip().split("  ")[0].split(" ")[0] for line in text.splitlines() if line.strip())
    assert "task:nightschool_general" in shown
