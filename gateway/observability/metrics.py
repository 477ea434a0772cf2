"""The Prometheus metrics that each request updates, and the body of `/metrics`. Units are seconds and tokens.

INVARIANT: the set of label values is bounded. Labels hold configured names (class, engine, tenant) and models that an
engine serves, never a value that a client sent.
"""

from __future__ import annotations

from typing import Protocol

from prometheus_client import REGISTRY, CollectorRegistry, Counter, Gauge, generate_latest
from prometheus_client.openmetrics import exposition as openmetrics

from gateway.observability.ledger import Entry
from gateway.observability.series import Counters, Histograms, Labels
from gateway.observability.state_metrics import DroppedRecords
from gateway.observability.usage_metrics import UsageMetrics
from gateway.tenants.usage import Usage

_REQUEST = ("slo_class", "model", "engine")

# Upper bounds of histogram buckets.
_LATENCY_S = (0.01, 0.025, 0.05, 0.1, 0.2, 0.3, 0.5, 0.75, 1, 1.5, 2, 3, 5, 7.5, 10, 15, 30, 60, 120)
_TPOT_S = (0.002, 0.005, 0.01, 0.015, 0.02, 0.025, 0.03, 0.04, 0.05, 0.06, 0.08, 0.1, 0.15, 0.2, 0.3, 0.5, 1)
_SHORT_S = (1e-5, 2.5e-5, 5e-5, 1e-4, 2.5e-4, 5e-4, 1e-3, 2.5e-3, 5e-3, 1e-2, 2.5e-2, 5e-2, 0.1, 0.25, 1)
_RATIOS = (0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 1, 2, 5)
_QUOTIENTS = (0.25, 0.5, 0.7, 0.8, 0.9, 1, 1.1, 1.25, 1.5, 2, 3, 5, 10)
_TOKENS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000)

TEXT_FORMAT = "text/plain; version=0.0.4; charset=utf-8"


class _Connections(Protocol):
    buffered: int

    def __len__(self) -> int: ...


class _Bodies(Protocol):
    @property
    def used(self) -> int: ...


class Metrics:
    """The metrics of one gateway, in a separate registry. `exposition` appends those of an in-process vLLM."""

    def __init__(self) -> None:
        registry = self.registry = CollectorRegistry()
        self.requests = Counters(
            "antares_requests_total",
            "Accepted requests by outcome and reason.",
            (*_REQUEST, "tenant", "outcome", "reason"),
            registry,
        )
        self.attained = Counters(
            "antares_requests_attained_total",
            "Requests that finished and met every bound.",
            (*_REQUEST, "tenant"),
            registry,
        )
        self.violations = Counters(
            "antares_slo_violations_total",
            "Bounds that finished requests missed.",
            (*_REQUEST, "bound"),
            registry,
        )
        self.ttft = Histograms(
            "antares_ttft_seconds", "Time from arrival to the first output token.", _REQUEST, _LATENCY_S, registry
        )
        self.tpot = Histograms(
            "antares_tpot_seconds", "Mean time per output token after the first.", _REQUEST, _TPOT_S, registry
        )
        self.e2e = Histograms(
            "antares_e2e_seconds", "Time from arrival to the last output token.", _REQUEST, _LATENCY_S, registry
        )
        self.ttft_ratio = Histograms(
            "antares_ttft_prediction_ratio",
            "Measured TTFT divided by the TTFT predicted at admission, of finished requests.",
            _REQUEST, _QUOTIENTS, registry,
        )  # fmt: skip
        self.tpot_ratio = Histograms(
            "antares_tpot_prediction_ratio",
            "Measured TPOT divided by the step time predicted at admission, of finished requests.",
            _REQUEST, _QUOTIENTS, registry,
        )  # fmt: skip
        self.queue = Histograms(
            "antares_queue_seconds", "Time from arrival to admission.", _REQUEST, _LATENCY_S, registry
        )
        self.prompt_tokens = Counters(
            "antares_prompt_tokens_total", "Prompt tokens of requests that reached an engine.",
            (*_REQUEST, "tenant"), registry,
        )  # fmt: skip
        self.output_tokens = Counters(
            "antares_output_tokens_total", "Output tokens of requests that reached an engine.",
            (*_REQUEST, "tenant"), registry,
        )  # fmt: skip
        self.prompt_size_error = Histograms(
            "antares_prompt_size_error_ratio", "Relative error of estimated prompt sizes.", ("model",), _RATIOS,
            registry,
        )  # fmt: skip
        self.prefix_tokens = Counters(
            "antares_prefix_cache_tokens_total",
            "Tokens of prompts whose prefix-cache hit the engine reported: all, predicted to be cached, cached.",
            ("model", "engine", "kind"), registry,
        )  # fmt: skip
        self.prediction_error = Histograms(
            "antares_prediction_error_tokens", "Absolute error of the predicted output length.", (), _TOKENS, registry
        )
        self.predictions = Counters(
            "antares_predictions_total", "Output-length predictions by source.", ("source",), registry
        )
        self.prediction_seconds = Histograms(
            "antares_prediction_seconds", "Time that a request waited for its prediction.", (), _SHORT_S, registry
        )
        self.predictor_up = Gauge(
            "antares_predictor_up", "1 while the predictor service responds, else 0.", registry=registry
        )
        self.predictor_restarts = Counter(
            "antares_predictor_restarts_total",
            "Restarts of the supervised predictor.",
            registry=registry,
        )
        self.scheduling = Histograms(
            "antares_scheduling_seconds", "Duration of one policy decision, including its application.", ("engine",),
            _SHORT_S, registry,
        )  # fmt: skip
        self.http_requests = Counters(
            "antares_http_requests_total", "HTTP responses of the gateway.", ("route", "status"), registry
        )
        self.failovers = Counter(
            "antares_failovers_total", "Requests that went to another engine because this one failed them.",
            ("engine", "reason"), registry=registry,
        )  # fmt: skip
        self.failovers_denied = Counter(
            "antares_failovers_denied_total", "Failed requests that stayed with their engine, by what forbade another.",
            ("reason",), registry=registry,
        )  # fmt: skip
        for reason in ("budget", "deadline"):
            self.failovers_denied.labels(reason)
        self.pass_through = Gauge(
            "antares_pass_through_requests",
            "Requests that an engine serves without scheduling.",
            ("engine",),
            registry=registry,
        )
        self.usage = Usage()
        registry.register(UsageMetrics(self.usage))
        self.dropped_records = DroppedRecords()
        registry.register(self.dropped_records)
        self.connections = Gauge("antares_connections", "Open connections of clients.", registry=registry)
        self.connections_closed = Counter(
            "antares_connections_closed_total", "Connections that the gateway closed or refused, by reason.",
            ("reason",), registry=registry,
        )  # fmt: skip
        self.response_buffer = Gauge(
            "antares_response_buffer_bytes", "Response data that waits for clients.", registry=registry
        )
        self.body_memory = Gauge("antares_body_memory_bytes", "Memory reserved for request bodies.", registry=registry)
        for source in ("service", "fallback"):
            self.predictions.add((source,), 0)

    def on_response(self, route: str, status: int) -> None:
        """Count one HTTP response of the gateway."""
        self.http_requests.add((route, str(status)))

    def on_connection_closed(self, reason: str) -> None:
        """Count a connection that the gateway closed or refused because of ``reason``."""
        self.connections_closed.labels(reason).inc()

    def watch_edge(self, connections: _Connections, bodies: _Bodies) -> None:
        """Export the state of the HTTP edge, read at each scrape."""
        self.connections.set_function(lambda: float(len(connections)))
        self.response_buffer.set_function(lambda: float(connections.buffered))
        self.body_memory.set_function(lambda: float(bodies.used))

    def on_prediction(self, source: str, seconds: float) -> None:
        """Count one length prediction, which a request waited ``seconds`` for."""
        self.predictions.add((source,))
        self.prediction_seconds.observe((), seconds)

    def on_close(self, entry: Entry) -> None:
        """Count a request that ended (`Ledger.on_close`)."""
        request = entry.request
        labels, tenant = (request.slo_class, request.model, entry.engine), self.usage.label(request.tenant)
        of_tenant = (*labels, tenant)
        self.requests.add((*of_tenant, entry.outcome or "", entry.reason))
        if entry.attained:
            self.attained.add(of_tenant)
        for bound in entry.violated:
            self.violations.add((*labels, bound))
        exemplar = _exemplar(entry)
        if request.admitted_s is not None:
            self.queue.observe(labels, entry.queue_s, exemplar)
            self.prompt_tokens.add(of_tenant, request.prompt_tokens)
            self.output_tokens.add(of_tenant, request.generated)
        self._count_prompt(entry)
        if entry.outcome == "finished":
            if entry.ttft_s is not None:
                self.ttft.observe(labels, entry.ttft_s, exemplar)
            self.tpot.observe(labels, entry.tpot_s, exemplar)
            self.e2e.observe(labels, entry.e2e_s, exemplar)
            self._compare_with_predictions(entry, labels)
            self.prediction_error.observe((), abs(request.generated / request.sequences - request.predicted_at_arrival))

    def _compare_with_predictions(self, entry: Entry, labels: Labels) -> None:
        if entry.ttft_s is not None and entry.predicted_ttft_s:
            self.ttft_ratio.observe(labels, entry.ttft_s / entry.predicted_ttft_s)
        if entry.tpot_s > 0 and entry.predicted_tpot_s:
            self.tpot_ratio.observe(labels, entry.tpot_s / entry.predicted_tpot_s)

    def _count_prompt(self, entry: Entry) -> None:
        request = entry.request
        if entry.estimated_prompt_tokens is not None and request.first_token_s is not None:
            error = abs(entry.estimated_prompt_tokens / request.prompt_tokens - 1)
            self.prompt_size_error.observe((request.model,), error)
        if entry.cached_tokens is not None:
            tokens = (request.prompt_tokens, entry.predicted_cached_tokens, entry.cached_tokens)
            for kind, count in zip(("prompt", "predicted", "cached"), tokens, strict=True):
                self.prefix_tokens.add((request.model, entry.engine, kind), count)

    def exposition(self) -> bytes:
        """Return the body of `/metrics`: this registry, then the process-wide one that an in-process vLLM uses."""
        return generate_latest(self.registry) + generate_latest(REGISTRY)

    def negotiated(self, accept: str) -> tuple[bytes, str]:
        """Return the body of `/metrics` and its content type in the format that the header ``accept`` asks for.

        OpenMetrics, which Prometheus asks for, has exemplars. They name late and traced requests.
        """
        if "application/openmetrics-text" not in accept:
            return self.exposition(), TEXT_FORMAT
        own, shared = (_open_metrics(registry) for registry in (self.registry, REGISTRY))
        return own.removesuffix(b"# EOF\n") + shared, openmetrics.CONTENT_TYPE_LATEST


def _open_metrics(registry: CollectorRegistry) -> bytes:
    body: bytes = openmetrics.generate_latest(registry)  # type: ignore[no-untyped-call]
    return body


def _exemplar(entry: Entry) -> dict[str, str] | None:
    """Return what leads from a bucket to a request: its ids, if it was late or is traced."""
    trace = entry.trace
    if trace is not None and trace.sampled and trace.span_id:
        return {"trace_id": trace.trace_id, "request_id": entry.request.id}
    return {"request_id": entry.request.id} if entry.violated else None
