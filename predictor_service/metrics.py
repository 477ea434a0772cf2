"""The predictor's own Prometheus metrics; prefix ``antares_predictor_``, seconds and counts."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

_LATENCY_BUCKETS = (0.0005, 0.001, 0.002, 0.003, 0.005, 0.01, 0.02, 0.05, 0.1, 0.25, 0.5, 1.0)
_BATCH_BUCKETS = (1, 2, 4, 8, 16, 32, 64, 128, 256)


class PredictorMetrics:
    """One service's metrics in a registry of their own, so that two services may live in one process."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.requests = Counter(
            "antares_predictor_requests",
            "Calls of /v1/predict, by HTTP status.",
            ["status"],
            registry=self.registry,
        )
        self.latency = Histogram(
            "antares_predictor_request_seconds",
            "Seconds from a /v1/predict call's arrival to its answer.",
            buckets=_LATENCY_BUCKETS,
            registry=self.registry,
        )
        self.batch_size = Histogram(
            "antares_predictor_batch_size",
            "Inputs computed together.",
            buckets=_BATCH_BUCKETS,
            registry=self.registry,
        )
        self.queue_depth = Gauge(
            "antares_predictor_queue_depth",
            "Inputs waiting for a batch.",
            registry=self.registry,
        )

    def render(self) -> bytes:
        """The Prometheus text exposition."""
        return generate_latest(self.registry)
