"""Prometheus metrics of the predictor, with the prefix ``antares_predictor_``. Times are in seconds."""

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
    """Metrics of one service, in their own registry, so that several services may run in one process."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.requests = Counter(
            "antares_predictor_requests",
            "Calls to /v1/predict, by HTTP status.",
            ["status"],
            registry=self.registry,
        )
        self.latency = Histogram(
            "antares_predictor_request_seconds",
            "Seconds from the arrival of a /v1/predict call to its response.",
            buckets=_LATENCY_BUCKETS,
            registry=self.registry,
        )
        self.batch_size = Histogram(
            "antares_predictor_batch_size",
            "Inputs in one batch.",
            buckets=_BATCH_BUCKETS,
            registry=self.registry,
        )
        self.queue_depth = Gauge(
            "antares_predictor_queue_depth",
            "Inputs waiting for a batch.",
            registry=self.registry,
        )

    def watch(self, learning: Learning) -> None:
        """Export the state of ``learning`` at each scrape."""
        self.registry.register(_LearningState(learning))

    def render(self) -> bytes:
        """Return the metrics in the Prometheus text format."""
        return generate_latest(self.registry)


class _LearningState(Collector):
    """Gauges of online calibration. `predictor_service.calibration.online.MAX_WINDOWS` bounds the label values."""

    def __init__(self, learning: Learning) -> None:
        self._learning = learning

    def collect(self) -> Iterable[Metric]:
        error = GaugeMetricFamily(
            "antares_predictor_calibration_error",
            "Share of the latest finished answers within the p90 in effect when they were reported, minus 0.9.",
            labels=_LABELS,
        )
        answers = GaugeMetricFamily(
            "antares_predictor_calibration_answers",
            "Number of answers behind antares_predictor_calibration_error.",
            labels=_LABELS,
        )
        for (model, slo_class), (value, count) in self._learning.calibration.calibration_errors().items():
            error.add_metric((model, slo_class), value)
            answers.add_metric((model, slo_class), count)
        observed = CounterMetricFamily("antares_predictor_observations", "Finished answers reported to /v1/observe.")
        observed.add_metric((), self._learning.calibration.observed)
        failures = CounterMetricFamily(
            "antares_predictor_write_failures", "Failed writes of corrections or training data."
        )
        failures.add_metric((), self._learning.failures)
        return error, answers, observed, failures
