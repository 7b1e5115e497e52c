"""Parts of the docs that are drawn from the code. `python -m tests.render_docs` rewrites them; a test compares."""

from __future__ import annotations

import re
from pathlib import Path

from loop.nightly import EXAMINE, PROMOTE
from loop.stage import Stage
from loop.states import MOVES
from service.bench import promises
from service.problems import STATUS

ROOT = Path(__file__).parent.parent


def states() -> str:
    lines = [f"    {source} --> {target}" for source, targets in MOVES.items() for target in sorted(targets)]
    return "\n".join(["```mermaid", "stateDiagram-v2", "    [*] --> claimed", *lines, "```"])


def stages() -> str:
    return "\n".join(["| stages | stage | needs | gives | what it does |", "|---|---|---|---|---|", *_rows()])


def _rows() -> list[str]:
    return [_row(name, stage) for name, tuple_ in (("EXAMINE", EXAMINE), ("PROMOTE", PROMOTE)) for stage in tuple_]


def _row(name: str, stage: Stage) -> str:
    module = __import__(stage.run.__module__, fromlist=["__doc__"])
    needs = ", ".join(kind.__name__ for kind in stage.needs) or "–"
    told = " ".join((module.__doc__ or "").split("\n\n")[0].split())
    return f"| {name} | {stage.name} | {needs} | {stage.gives.__name__} | {told} |"


def problems() -> str:
    lines = [f"| {kind.__name__} | {status} |" for kind, status in STATUS.items()]
    return "\n".join(["| error | status |", "|---|---|", *lines])


BLOCKS = {"states": states, "stages": stages, "problems": problems, "figures": promises.table}


def rendered(text: str) -> str:
    """`text` with each `<!-- name -->` … `<!-- /name -->` block drawn anew."""
    for name, draw in BLOCKS.items():
        pattern = re.compile(rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)", re.DOTALL)
        text = pattern.sub(lambda match, draw=draw: f"{match[1]}{draw()}\n{match[2]}", text)  # type: ignore[misc]
    return text


def main() -> None:
    for path in sorted((ROOT / "docs").glob("*.md")):
        text = path.read_text(encoding="utf-8")
        path.write_text(rendered(text), encoding="utf-8")


if __name__ == "__main__":
    main()
