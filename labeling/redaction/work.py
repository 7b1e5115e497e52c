"""How much a regular expression can make `re` do at one position of a text, whatever the text.

With a bound at every position the whole search is linear. Python's engine tries every way to split a text among
repeats that may give back what they took; a possessive repeat (`*+`, `{0,9}+`) or an atomic group gives nothing back.
"""

from __future__ import annotations

from typing import Any

from re import _constants, _parser  # type: ignore[attr-defined]  # isort: skip  # the one parser that re itself uses

MOST = 10**12
LONGEST_GROUP = 1000  # what a reference to a group may have to compare


class UnboundedWork(ValueError):
    """The pattern has a repeat without an upper limit."""


def steps(pattern: str, flags: int = 0) -> int:
    """An upper bound of the steps at one position; `MOST` where beyond counting. Raises re.error, UnboundedWork."""
    cost, _ = _sequence(_parser.parse(pattern, flags))
    return cost


def shortest(pattern: str) -> int:
    """Characters of the shortest match."""
    least: int = _parser.parse(pattern).getwidth()[0]
    return least


def _sequence(nodes: Any) -> tuple[int, int]:
    """(steps, ways to match): each later part is tried again for every way of the earlier ones."""
    cost, ways = 0, 1
    for operation, argument in nodes:
        own_cost, own_ways = _node(str(operation), argument)
        cost, ways = min(cost + ways * own_cost, MOST), min(ways * own_ways, MOST)
    return cost, ways


def _node(operation: str, argument: Any) -> tuple[int, int]:
    if operation == "GROUPREF_EXISTS":
        raise UnboundedWork("a conditional group (?(1)...) can't be bounded: write the two cases as a|b")
    if operation.endswith("_REPEAT"):
        return _repeat(operation, *argument)
    match operation:
        case "BRANCH":
            branches = [_sequence(branch) for branch in argument[1]]
            return sum(cost + 1 for cost, _ in branches), sum(ways for _, ways in branches)
        case "SUBPATTERN":
            return _sequence(argument[3])
        case "ATOMIC_GROUP":
            return _sequence(argument)[0], 1
        case "ASSERT" | "ASSERT_NOT":
            return _sequence(argument[1])[0], 1
    return (LONGEST_GROUP, 1) if operation == "GROUPREF" else (1, 1)


def _repeat(operation: str, least: int, most: int, inner: Any) -> tuple[int, int]:
    if most >= _constants.MAXREPEAT:
        raise UnboundedWork("* and + and {n,} have no upper limit: write one, such as {0,64}+ or {1,200}+")
    cost, ways = _sequence(inner)
    if operation == "POSSESSIVE_REPEAT":
        return min(most * cost + 1, MOST), 1
    total_cost, total_ways, power = 1, 0, 1
    for count in range(most + 1):
        if count >= least:
            total_ways = min(total_ways + power, MOST)
        if count < most:
            total_cost = min(total_cost + power * cost, MOST)
        power = min(power * ways, MOST)
    return total_cost, total_ways
