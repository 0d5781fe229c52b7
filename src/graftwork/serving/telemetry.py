"""What the server counts, as Prometheus reads it."""

from __future__ import annotations

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_LATEST

_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
_ROWS = (1, 2, 4, 8, 16, 32, 64)


class Telemetry:
    """The counters of one server, apart from those of any other in the process."""

    content_type = CONTENT_TYPE_LATEST

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.requests = Counter(
            "graftwork_requests",
            "Requests answered, by endpoint and status.",
            ("endpoint", "status"),
            registry=self.registry,
        )
        self.seconds = Histogram(
            "graftwork_request_seconds",
            "Time from a request to its answer.",
            ("endpoint",),
            buckets=_SECONDS,
            registry=self.registry,
        )
        self.batch = Histogram(
            "graftwork_batch_questions", "Questions answered at once.", buckets=_ROWS, registry=self.registry
        )
        self.tokens = Counter("graftwork_generated_tokens", "Tokens generated.", registry=self.registry)
        self.cancelled = Counter(
            "graftwork_given_up", "Questions given up, by reason.", ("reason",), registry=self.registry
        )
        self.passages = Counter(
            "graftwork_passages", "Passages added to and deleted from the bank.", ("change",), registry=self.registry
        )

    def watch(self, waiting: Callable[[], int], healthy: Callable[[], bool]) -> None:
        """Read the length of the line and the state of the model whenever they are asked for."""
        Gauge("graftwork_waiting_questions", "Questions in the line.", registry=self.registry).set_function(
            lambda: float(waiting())
        )
        Gauge(
            "graftwork_healthy",
            "1 as long as the weights are, as far as was looked, what they were.",
            registry=self.registry,
        ).set_function(lambda: float(healthy()))

    def text(self) -> bytes:
        """All of it, as text."""
        return generate_latest(self.registry)
