"""Processes below a process, as /proc tells them: a launcher puts its own into sessions that no group reaches."""

from __future__ import annotations

from pathlib import Path

PROC = Path("/proc")


def children(process: int) -> list[int]:
    """Started by any of its threads."""
    return _by_parent().get(process, [])


def descendants(process: int) -> list[int]:
    """At any depth, parents first; without the process itself."""
    below, found = _by_parent(), [process]
    for one in found:
        found += below.get(one, [])
    return found[1:]


def _by_parent() -> dict[int, list[int]]:
    found: dict[int, list[int]] = {}
    for path in PROC.glob("[0-9]*/stat"):
        try:
            told = path.read_text(encoding="ascii", errors="replace")
        except OSError:
            continue  # it has ended
        parent = int(told.rpartition(")")[2].split()[1])
        found.setdefault(parent, []).append(int(path.parent.name))
    return found
