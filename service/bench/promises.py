"""Every figure that `nightschool bench` gives: what it is, and the bar that it is held to. docs/bench.md shows them.

A figure is made by `held`, so that none can be given that is not listed; one that a bench leaves out is not met.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from service.bench.figure import Bar, Figure


@dataclass(frozen=True)
class Promise:
    what: str
    bar: float
    how: Bar = Bar.AT_LEAST


PROMISES: dict[str, dict[str, Promise]] = {
    "dedup": {
        "near_duplicates_vs_datasketch": Promise("texts a second of ~500 characters, against datasketch's LSH", 40),
        "near_duplicate_recall": Promise("share of the planted near-duplicates that are found", 0.99),
    },
    "gateway": {
        "gateway_vs_litellm_rps": Promise("requests a second against LiteLLM's proxy", 30),
        "gateway_vs_bare_passthrough": Promise(
            "requests a second against a pass-through that checks and keeps nothing", 0.7
        ),
        "gateway_p99_vs_litellm_p50": Promise(
            "our slowest hundredth against LiteLLM's typical request", 0.2, Bar.AT_MOST
        ),
        "gateway_stream_vs_direct": Promise(
            "tokens a second of 64 streams, against the engine without the gateway", 0.97
        ),
    },
    "ingest": {
        "durable_vs_per_row_commit": Promise("feedback a second against one commit a request", 3),
        "durable_vs_ack_first": Promise("feedback a second against answering before the write", 0.85),
        "durable_vs_no_storage": Promise("feedback a second against storing nothing", 0.6),
        "rows_minus_acks": Promise("rows without an acknowledgement, and acknowledgements without a row", 0, Bar.EQUAL),
        "postgres_batch_vs_single": Promise("rows a second into PostgreSQL, in batches against one by one", 15),
        "postgres_processes_rows_minus_acks": Promise("the same of four processes that share their keys", 0, Bar.EQUAL),
        "postgres_deadlocks": Promise("deadlocks meanwhile", 0, Bar.EQUAL),
    },
    "labelling": {
        "label_seconds_by_webhook": Promise(
            "longest time from the click to the label by webhook, in seconds", 2, Bar.AT_MOST
        ),
        # The look itself takes a moment, hence the tenth.
        "label_poll_intervals_by_polling": Promise("the same by polling, in intervals", 1.1, Bar.AT_MOST),
    },
    "queue": {
        "queue_1m_vs_10k": Promise(
            "one more flag with a million items behind it, against ten thousand", 1.5, Bar.AT_MOST
        ),
    },
    "redaction": {
        "redaction_precision": Promise("share of what was replaced that had to be, in untuned texts", 0.97),
        "redaction_recall": Promise("share of what had to be replaced that was", 0.93),
        "redaction_names_precision": Promise("the first, of people's names by the small English model", 0.93),
        "redaction_names_recall": Promise("the second, of people's names by the small English model", 0.8),
    },
    "selection": {
        "labels_random_vs_score": Promise("labels for 30 % of the mistakes mended: drawn by lot, against chosen", 1),
        "labels_random_vs_score_with_slice": Promise("the same against chosen with a tenth by lot, the default", 1),
    },
}
_BY_NAME = {name: promise for figures in PROMISES.values() for name, promise in figures.items()}


def held(name: str, value: float, detail: str = "") -> Figure:
    """KeyError: a figure that is not listed."""
    promise = _BY_NAME[name]
    return Figure(name, value, promise.bar, promise.how, detail)


def not_measured(names: Iterable[str], why: str) -> list[Figure]:
    return [held(name, math.nan, f"not measured: {why}") for name in names]


def whole(bench: str, given: Iterable[Figure]) -> list[Figure]:
    """In the order of the list, with those that the bench did not give."""
    found = {figure.figure: figure for figure in given}
    missing = {one.figure: one for one in not_measured(PROMISES[bench].keys() - found.keys(), "the bench gave none")}
    strange = found.keys() - PROMISES[bench].keys()
    if strange:
        raise KeyError(f"the bench {bench} gave what is listed under another: {', '.join(sorted(strange))}")
    return [(found | missing)[name] for name in PROMISES[bench]]


def table() -> str:
    lines = [
        f"| {bench} | `{name}` | {promise.what} | {promise.how} {promise.bar:g} |"
        for bench, figures in PROMISES.items()
        for name, promise in figures.items()
    ]
    return "\n".join(["| bench | figure | what | bar |", "|---|---|---|---|", *lines])
