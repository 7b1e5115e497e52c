"""The gateway beside LiteLLM's proxy, a bare pass-through and the engine alone: requests, latencies, streams."""

from __future__ import annotations

import asyncio
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import httpx

from labeling.errors import NightschoolError
from service.bench.figure import Figure, Say
from service.bench.gateway_servers import Servers, Side, measure, servers
from service.bench.load import Seen
from service.bench.promises import held, not_measured

CONNECTIONS = 32
STREAMS = 64
NO_LITELLM = "LiteLLM's environment .venv-bench is missing; `make bench` installs it"


class SideFailed(NightschoolError):
    code = "side_failed"


@dataclass(frozen=True)
class Plan:
    """`tokens_per_second` of each stream: 64 of them make 3,200 a second, a busy engine's."""

    rounds: int = 3
    warm_up_seconds: float = 1.5
    seconds: float = 5.0
    stream_tokens: int = 200
    tokens_per_second: float = 50.0


@dataclass(frozen=True)
class Captured:
    """What became of the exchanges that the gateway answered."""

    stored: int
    dropped: int
    most_waiting: int


def run(say: Say) -> list[Figure]:
    return asyncio.run(measured(Plan(), say))


async def measured(plan: Plan, say: Say) -> list[Figure]:
    with tempfile.TemporaryDirectory(prefix="nightschool-bench-") as folder:
        async with servers(Path(folder), say) as found:
            requests, captured = await _requests(found, plan, say)
            paced = await _streams(found, plan, plan.tokens_per_second, say)
            flat_out = await _streams(found, plan, 0.0, say)
    return [*_request_figures(requests, captured), _stream_figure(paced, flat_out, plan)]


async def _requests(found: Servers, plan: Plan, say: Say) -> tuple[dict[str, list[Seen]], Captured]:
    """Each side in turn, round after round; the gateway's captures are written before the next side begins."""
    sides = [side for side in (found.litellm, found.ours, found.bare) if side is not None]
    for side in sides:
        await measure(side.load(CONNECTIONS, plan.warm_up_seconds))
    seen: dict[str, list[Seen]] = {side.name: [] for side in sides}
    waiting = []
    for number in range(1, plan.rounds + 1):
        for side in sides:
            seen[side.name].append(one := _whole(side, await measure(side.load(CONNECTIONS, plan.seconds))))
            if side is found.ours:
                waiting.append(await _settled(found.ours))
            say(f"gateway: round {number}: {side.name} {_told([one])}")
    figures = await _figures(found.ours)
    return seen, Captured(
        stored=int(figures["nightschool_captured_exchanges_total"]),
        dropped=int(
            sum(value for name, value in figures.items() if name.startswith("nightschool_capture_dropped_total"))
        ),
        most_waiting=max(waiting),
    )


async def _streams(found: Servers, plan: Plan, rate: float, say: Say) -> dict[str, list[Seen]]:
    sides = (found.engine, found.ours)
    seen: dict[str, list[Seen]] = {side.name: [] for side in sides}
    for _ in range(plan.rounds):
        for side in sides:
            load = side.load(STREAMS, stream=True, max_tokens=plan.stream_tokens, tokens_per_second=rate)
            one = _whole(side, await measure(load))
            seen[side.name].append(one)
            say(f"gateway: {STREAMS} streams, {side.name}: {one.events_per_second:,.0f} tokens/s")
        await _settled(found.ours)
    return seen


def _whole(side: Side, seen: Seen) -> Seen:
    """A side that refuses or breaks off is not measured by what it did answer."""
    if seen.failed or set(seen.statuses) != {200}:
        raise SideFailed(f"{side.name}: {seen.failed} connections failed, answers by status: {seen.statuses}")
    return seen


async def _settled(side: Side) -> int:
    """Waits until all captures are written; how many waited at first."""
    first = int((await _figures(side))["nightschool_capture_waiting"])
    while (await _figures(side))["nightschool_capture_waiting"]:  # noqa: ASYNC110  # in another process
        await asyncio.sleep(0.05)
    return first


async def _figures(side: Side) -> Mapping[str, float]:
    async with httpx.AsyncClient(trust_env=False) as client:
        lines = (await client.get(f"{side.url}/metrics")).text.splitlines()
    return {name: float(value) for name, _, value in (line.rpartition(" ") for line in lines if line[:1] != "#")}


def _request_figures(seen: Mapping[str, Sequence[Seen]], captured: Captured) -> list[Figure]:
    ours, bare, litellm = seen["gateway"], seen["pass-through"], seen.get("LiteLLM")
    kept = f"{captured.stored:,} exchanges stored, {captured.dropped:,} dropped"
    kept = f"{kept}, {captured.most_waiting:,} at most waiting when the load ended"
    against_bare = held(
        "gateway_vs_bare_passthrough",
        _rate(ours) / _rate(bare),
        f"gateway {_told(ours)}; pass-through {_told(bare)}; {kept}",
    )
    if litellm is None:
        return [against_bare, *not_measured(("gateway_vs_litellm_rps", "gateway_p99_vs_litellm_p50"), NO_LITELLM)]
    told = f"gateway {_told(ours)}; LiteLLM {_told(litellm)}"
    slowest, typical = _percentile(ours, 0.99), _percentile(litellm, 0.5)
    return [
        held("gateway_vs_litellm_rps", _rate(ours) / _rate(litellm), told),
        against_bare,
        held("gateway_p99_vs_litellm_p50", slowest / typical, told),
    ]


def _stream_figure(paced: Mapping[str, Sequence[Seen]], flat_out: Mapping[str, Sequence[Seen]], plan: Plan) -> Figure:
    """The bar is for an engine's pace: no engine makes tokens as fast as a program that only writes them down."""
    direct, through = ([_tokens(seen[side]) for seen in (paced, flat_out)] for side in ("direct", "gateway"))
    detail = (
        f"{STREAMS} streams of {plan.tokens_per_second:g} tokens/s: {through[0]:,.0f} tokens/s through the gateway,"
        f" {direct[0]:,.0f} direct; from an engine without pace {through[1]:,.0f} and {direct[1]:,.0f}"
        f" ({through[1] / direct[1]:.2f})"
    )
    return held("gateway_stream_vs_direct", through[0] / direct[0], detail)


def _rate(seen: Sequence[Seen]) -> float:
    return sum(one.answered for one in seen) / sum(one.seconds for one in seen)


def _tokens(seen: Sequence[Seen]) -> float:
    return sum(one.events for one in seen) / sum(one.seconds for one in seen)


def _percentile(seen: Sequence[Seen], share: float) -> float:
    return median(one.percentile_ms(share) for one in seen)


def _told(seen: Sequence[Seen]) -> str:
    rates = [one.per_second for one in seen]
    spread = f" ({min(rates):,.0f}-{max(rates):,.0f})" if len(rates) > 1 else ""
    latencies = f"p50 {_percentile(seen, 0.5):.1f} ms, p99 {_percentile(seen, 0.99):.1f} ms"
    return f"{_rate(seen):,.0f} requests/s{spread}, {latencies}"
