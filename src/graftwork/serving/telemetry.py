"""Prometheus metrics of the server."""

from __future__ import annotations

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_LATEST

_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
_ROWS = (1, 2, 4, 8, 16, 32, 64)


class Telemetry:
    """Metrics of one server, in a separate registry."""

    content_type = CONTENT_TYPE_LATEST

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.requests = Counter(
            "graftwork_requests",
            "Number of requests, by endpoint and status.",
            ("endpoint", "status"),
            registry=self.registry,
        )
        self.seconds = Histogram(
            "graftwork_request_seconds",
            "Duration of a request, by endpoint.",
            ("endpoint",),
            buckets=_SECONDS,
            registry=self.registry,
        )
        self.batch = Histogram(
            "graftwork_batch_questions",
            "Number of answers in progress, at every token.",
            buckets=_ROWS,
            registry=self.registry,
        )
        self.tokens = Counter("graftwork_generated_tokens", "Number of generated tokens.", registry=self.registry)
        self.failures = Counter(
            "graftwork_model_thread_failures",
            "Number of batches that failed as a whole.",
            registry=self.registry,
        )
        self.abandoned = Counter(
            "graftwork_given_up",
            "Number of questions that were abandoned, by reason: gone (client disconnected) or timeout.",
            ("reason",),
            registry=self.registry,
        )
        self.passages = Counter(
            "graftwork_passages",
            "Number of passages added to and deleted from the bank.",
            ("change",),
            registry=self.registry,
        )

    def add_gauges(self, waiting: Callable[[], int], healthy: Callable[[], bool]) -> None:
        """Register gauges that are read from these callables at every scrape."""
        Gauge("graftwork_waiting_questions", "Number of questions in the queue.", registry=self.registry).set_function(
            lambda: float(waiting())
        )
        Gauge(
            "graftwork_healthy",
            "1 while the server answers; 0 once the weights were found to have changed, or while it closes.",
            registry=self.registry,
        ).set_function(lambda: float(healthy()))

    def text(self) -> bytes:
        """Return all metrics in Prometheus' text format."""
        return generate_latest(self.registry)
