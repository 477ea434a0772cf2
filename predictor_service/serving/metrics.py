"""The predictor's own Prometheus metrics; prefix ``antares_predictor_``, seconds, tokens and counts."""

from __future__ import annotations

from collections.abc import Iterable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from predictor_service.serving.learning import Learning

_LATENCY_BUCKETS = (0.0005, 0.001, 0.002, 0.003, 0.005, 0.01, 0.02, 0.05, 0.1, 0.25, 0.5, 1.0)
_BATCH_BUCKETS = (1, 2, 4, 8, 16, 32, 64, 128, 256)
_LABELS = ("model", "slo_class")


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

    def watch(self, learning: Learning) -> None:
        """Read the state of ``learning`` whenever Prometheus scrapes."""
        self.registry.register(_LearningState(learning))

    def render(self) -> bytes:
        """The Prometheus text exposition."""
        return generate_latest(self.registry)


class _LearningState(Collector):
    """Labels are bounded: `online_calibration.MAX_WINDOWS` pairs of model and class."""

    def __init__(self, learning: Learning) -> None:
        self._learning = learning

    def collect(self) -> Iterable[Metric]:
        error = GaugeMetricFamily(
            "antares_predictor_calibration_error",
            "Share of the latest finished answers within the p90 that held when they came in, minus 0.9.",
            labels=_LABELS,
        )
        answers = GaugeMetricFamily(
            "antares_predictor_calibration_answers", "Finished answers that share is of.", labels=_LABELS
        )
        for (model, slo_class), (off, count) in self._learning.calibration.errors().items():
            error.add_metric((model, slo_class), off)
            answers.add_metric((model, slo_class), count)
        observed = CounterMetricFamily("antares_predictor_observations", "Finished answers that were reported.")
        observed.add_metric((), self._learning.calibration.observed)
        failures = CounterMetricFamily("antares_predictor_write_failures", "Times that a file could not be written.")
        failures.add_metric((), self._learning.failures)
        return error, answers, observed, failures
