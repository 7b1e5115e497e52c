"""Prometheus figures of one application, in a registry of their own; the place that counts them updates them."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily

from labeling.name_recogniser import FAILURES
from labeling.redaction.tally import REPLACED

SECONDS = (0.005, 0.025, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300)


class Metrics:
    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.requests = self._counter("requests", "Inference requests by project and status", "project", "code")
        self.seconds = Histogram(
            "nightschool_request_seconds",
            "Inference, from the request's first byte to the answer's last",
            ["project"],
            buckets=SECONDS,
            registry=self.registry,
        )
        self.first_byte = Histogram(
            "nightschool_first_byte_seconds",
            "Inference, until the engine's first byte",
            ["project"],
            buckets=SECONDS,
            registry=self.registry,
        )
        self.upstream_errors = self._counter("upstream_errors", "Engine unreachable or broken off", "replica", "kind")
        self.captured = self._counter("captured_exchanges", "Exchanges stored")
        self.capture_dropped = self._counter("capture_dropped", "Exchanges not stored, by reason", "reason")
        self.feedback = self._counter("feedback", "Feedback acknowledged", "project", "kind")
        self.feedback_refused = self._counter("feedback_refused", "Feedback not acknowledged, by reason", "reason")
        self.hooks = self._counter("label_hooks", "Label Studio's webhook calls: taken, or forged", "result")
        self.exchanges_deleted = self._of_project("exchanges_deleted", "Old exchanges deleted so far")
        self.exchanges_needed = self._of_project("exchanges_needed", "As old, but something needs them")
        self.commits = Histogram(
            "nightschool_feedback_commit_rows",
            "Feedback in one commit",
            buckets=(1, 2, 4, 8, 16, 32, 64, 128, 256),
            registry=self.registry,
        )

        self.registry.register(_Redacted())

    def _counter(self, name: str, text: str, *labels: str) -> Counter:
        return Counter(f"nightschool_{name}", text, labels, registry=self.registry)

    def _of_project(self, name: str, text: str) -> Gauge:
        return Gauge(f"nightschool_{name}", text, ["project"], registry=self.registry)

    def gauge(self, name: str, text: str, read: Callable[[], float]) -> None:
        """A figure that is read when somebody asks."""
        Gauge(f"nightschool_{name}", text, registry=self.registry).set_function(read)

    def render(self) -> tuple[bytes, str]:
        return generate_latest(self.registry), "text/plain; version=1.0.0"  # Litestar adds the charset


class _Redacted:
    """Counted by the redaction in this process, which knows no registry."""

    def collect(self) -> Iterator[CounterMetricFamily]:
        family = CounterMetricFamily(
            "nightschool_redacted", "Places replaced in feedback by redaction", labels=("project", "kind")
        )
        for (project, kind), places in sorted(REPLACED.items()):
            family.add_metric((project, kind), places)
        yield family
        failed = CounterMetricFamily(
            "nightschool_names_not_recognised", "Requests to the recogniser of names that failed", labels=("reason",)
        )
        for reason, requests in sorted(FAILURES.items()):
            failed.add_metric((reason,), requests)
        yield failed
