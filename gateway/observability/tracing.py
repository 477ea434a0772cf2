"""OpenTelemetry traces (extra ``otel``): one span for each scheduled request, and a child for each phase of it.

The spans are built from the request's record after it has ended, in a background thread. While a request runs, tracing
costs it one sampling decision. INVARIANT: no attribute holds text of a prompt or a completion.
"""

from __future__ import annotations

import os
import random
import socket
from collections.abc import Callable, Iterator
from typing import Any

from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import SERVICE_NAME, Resource
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SpanExporter, SpanExportResult
from opentelemetry.sdk.trace.sampling import Decision, ParentBased, Sampler, TraceIdRatioBased
from opentelemetry.sdk.util.instrumentation import InstrumentationScope
from opentelemetry.trace import (
    NonRecordingSpan,
    SpanContext,
    SpanKind,
    Status,
    StatusCode,
    TraceFlags,
    TraceState,
    set_span_in_context,
)

from gateway import __version__
from gateway.observability.background import BackgroundQueue
from gateway.observability.decisions import RequestRecord, to_ms
from gateway.observability.ledger import Attempt
from gateway.observability.trace_context import TraceContext

SPANS_PATH = "/v1/traces"
"""Path of an OTLP/HTTP collector for spans."""

CLOSE_S = 3.0
"""Seconds that a shutdown waits for the last spans to be exported. Convention."""

_OPERATIONS = {
    "/v1/chat/completions": "chat",
    "/v1/chat/completions/batch": "chat",
    "/v1/completions": "text_completion",
    "/v1/responses": "chat",
    "/v1/messages": "chat",
}
"""Route to ``gen_ai.operation.name``."""

_SCOPE = InstrumentationScope("antares", __version__)


class Tracer:
    """Samples requests, and exports the spans of the sampled ones over OTLP/HTTP.

    ``endpoint``: the collector's base URL, None for that of the environment (``OTEL_EXPORTER_OTLP_ENDPOINT``).
    ``sample_ratio``: of the requests without a parent, None for the sampler of the environment. The environment
    variables of OpenTelemetry also set headers, time-outs, resource and batches.
    """

    name = "traces"

    def __init__(
        self, endpoint: str | None = None, sample_ratio: float | None = None, exporter: SpanExporter | None = None
    ) -> None:
        self._sampler = _sampler(sample_ratio)
        self._resource = _resource()
        self._exporter = exporter or OTLPSpanExporter(endpoint=None if endpoint is None else spans_url(endpoint))
        self._queue: BackgroundQueue[RequestRecord] = BackgroundQueue(
            "traces",
            self._export,
            limit=_environment("OTEL_BSP_MAX_QUEUE_SIZE", 2048),
            max_batch=max(1, _environment("OTEL_BSP_MAX_EXPORT_BATCH_SIZE", 512) // 5),
            delay_s=_environment("OTEL_BSP_SCHEDULE_DELAY", 5000) / 1000,
        )

    @property
    def dropped(self) -> int:
        """Requests whose spans were not exported, because the queue was full or the collector did not take them."""
        return self._queue.dropped

    def begin(self, client: TraceContext | None) -> TraceContext:
        """Return the gateway's own context for a request with the ``client``'s context, and whether it is sampled."""
        trace_id = random.getrandbits(128) or 1 if client is None else int(client.trace_id, 16)
        parent = None if client is None else set_span_in_context(NonRecordingSpan(_remote(client)))
        sampled = self._sampler.should_sample(parent, trace_id, "request", SpanKind.SERVER).decision
        return TraceContext(
            f"{trace_id:032x}",
            "" if client is None else client.parent_id,
            f"{random.getrandbits(64) or 1:016x}",
            sampled is Decision.RECORD_AND_SAMPLE,
            "" if client is None else client.state,
        )

    def put(self, record: RequestRecord) -> None:
        """Export the spans of ``record``, if it was sampled."""
        if record.trace_sampled:
            self._queue.put(record)

    def close(self) -> None:
        """Export the waiting spans, for at most `CLOSE_S`. A collector that does not answer loses it."""
        self._queue.close(CLOSE_S)
        self._exporter.shutdown()

    def _export(self, records: list[RequestRecord]) -> None:
        spans = [span for record in records for span in spans_of(record, self._resource)]
        if self._exporter.export(spans) is not SpanExportResult.SUCCESS:
            raise ExportError


class ExportError(Exception):
    """The collector did not take the spans."""


def spans_url(endpoint: str) -> str:
    """Return the URL for spans of a collector with the base URL ``endpoint``."""
    endpoint = endpoint.rstrip("/")
    return endpoint if endpoint.endswith(SPANS_PATH) else endpoint + SPANS_PATH


def spans_of(record: RequestRecord, resource: Resource) -> Iterator[ReadableSpan]:
    """Yield the spans of one request: the server span, then its children in order of time."""
    # A span's id is a random number; the server span's was chosen before the request reached its engine.
    trace_id, flags, state = int(record.trace_id, 16), TraceFlags(TraceFlags.SAMPLED), TraceState()
    server = SpanContext(trace_id, int(record.span_id, 16), False, flags, state)
    parent = None
    if record.parent_id:
        parent = SpanContext(trace_id, int(record.parent_id, 16), True, flags, state)
    end = max(0.0, record.ended_at or 0.0)

    def at(seconds: float) -> int:
        return int((record.time + seconds) * 1e9)

    operation = _OPERATIONS.get(record.route, "chat")
    failed = record.outcome == "failed" or record.status >= 500
    yield ReadableSpan(
        f"{operation} {record.model}",
        server,
        parent,
        resource,
        _request_attributes(record, operation),
        kind=SpanKind.SERVER,
        status=Status(StatusCode.ERROR, record.reason) if failed else Status(),
        start_time=at(0.0),
        end_time=at(end),
        instrumentation_scope=_SCOPE,
    )
    for name, begin, until, attributes, error in _phases(record, end):
        yield ReadableSpan(
            name,
            SpanContext(trace_id, random.getrandbits(64) or 1, False, flags, state),
            server,
            resource,
            {key: value for key, value in attributes.items() if value is not None},
            kind=SpanKind.INTERNAL,
            status=Status(StatusCode.ERROR, error) if error else Status(),
            start_time=at(begin),
            end_time=at(max(begin, min(until, end))),
            instrumentation_scope=_SCOPE,
        )


def _request_attributes(record: RequestRecord, operation: str) -> dict[str, Any]:
    slo = record.slo
    attributes = {
        "gen_ai.operation.name": operation,
        "gen_ai.provider.name": "vllm",
        "gen_ai.request.model": record.model,
        "gen_ai.request.stream": record.stream,
        "gen_ai.response.time_to_first_chunk": None if record.ttft_s is None else round(record.ttft_s, 6),
        "gen_ai.response.model": record.model if record.outcome == "finished" else None,
        "gen_ai.usage.input_tokens": record.prompt_tokens,
        "gen_ai.usage.output_tokens": record.output_tokens,
        "gen_ai.usage.cache_read.input_tokens": record.cached_tokens,
        "http.request.method": "POST",
        "http.route": record.route,
        "http.response.status_code": record.status or None,
        "error.type": record.reason if record.outcome == "failed" else None,
        "antares.request.id": record.id,
        "antares.request.client_id": record.client_id,
        "antares.tenant": record.tenant,
        "antares.slo.class": record.slo_class,
        "antares.slo.ttft_ms": to_ms(slo.ttft_s),
        "antares.slo.tpot_ms": to_ms(slo.tpot_s),
        "antares.slo.e2e_ms": to_ms(slo.e2e_s),
        "antares.slo.attained": record.outcome == "finished" and not record.violated,
        "antares.slo.violated": record.violated,
        "antares.best_effort": record.bounds_waived,
        "antares.outcome": record.outcome,
        "antares.reason": record.reason or None,
        "antares.engine": record.engine or None,
        "antares.predicted.ttft_ms": to_ms(record.predicted_ttft_s),
        "antares.predicted.tpot_ms": to_ms(record.predicted_tpot_s),
        "antares.predicted.output_tokens": record.predicted_tokens if record.prediction_source else None,
        "antares.ttft_ms": to_ms(record.ttft_s),
        "antares.tpot_ms": to_ms(record.tpot_s),
        "antares.e2e_ms": to_ms(record.e2e_s),
        "antares.rejection.predicted_ms": to_ms(record.predicted_s),
        "antares.rejection.attainable_ms": to_ms(record.attainable_s),
    }
    return {key: value for key, value in attributes.items() if value is not None}


Phase = tuple[str, float, float, dict[str, Any], str]
"""Name, begin and end (s after arrival), attributes, and the error that ended it ("" for none)."""


def _phases(record: RequestRecord, end: float) -> Iterator[Phase]:
    if record.predicting_at is not None:
        source = {"antares.prediction.source": record.prediction_source}
        yield "predict", *record.predicting_at, source, ""
    for index, attempt in enumerate(record.attempts):
        yield from _attempt_phases(record, attempt, end, last=index == len(record.attempts) - 1)


def _attempt_phases(record: RequestRecord, attempt: Attempt, end: float, *, last: bool) -> Iterator[Phase]:
    after: Callable[[float], float] = lambda at: at - record.arrival_s  # noqa: E731 - shorter here
    engine = {"antares.engine": attempt.engine}
    ended = end if attempt.ended_s is None else after(attempt.ended_s)
    queue = {
        **engine,
        "antares.queue.waiting": attempt.waiting,
        "antares.queue.ahead": attempt.position,
        "antares.queue.running": attempt.running,
        "antares.predicted.ttft_ms": to_ms(attempt.predicted_ttft_s),
    }
    if attempt.admitted_s is None:
        yield "queue", after(attempt.placed_s), ended, queue, ""
        return
    admitted, first = after(attempt.admitted_s), record.first_token_at
    yield "queue", after(attempt.placed_s), admitted, queue, ""
    if not last or first is None:
        yield "prefill", admitted, ended, engine, attempt.end
        return
    yield "prefill", admitted, first, engine, ""
    yield "decode", first, end if record.e2e_s is None else record.e2e_s, engine, attempt.end


def _remote(client: TraceContext) -> SpanContext:
    flags = TraceFlags(TraceFlags.SAMPLED if client.sampled else TraceFlags.DEFAULT)
    return SpanContext(int(client.trace_id, 16), int(client.parent_id, 16), True, flags)


def _sampler(ratio: float | None) -> Sampler:
    if ratio is not None:
        return ParentBased(TraceIdRatioBased(ratio))
    # It reads OTEL_TRACES_SAMPLER. Without that, it samples what its parent samples, and everything without a parent.
    return TracerProvider(shutdown_on_exit=False).sampler


def _resource() -> Resource:
    # What the environment sets wins. Several gateways, or several processes of one, differ by host and process.
    process: dict[str, str | int] = {"host.name": socket.gethostname(), "process.pid": os.getpid()}
    resource = Resource(process).merge(Resource.create({"service.version": __version__}))
    named = not str(resource.attributes.get(SERVICE_NAME, "unknown_service")).startswith("unknown_service")
    return resource if named else resource.merge(Resource({SERVICE_NAME: "antares"}))


def _environment(name: str, default: int) -> int:
    value = os.environ.get(name, "")
    return int(value) if value.isascii() and value.isdigit() and 0 < int(value) < 1 << 31 else default
