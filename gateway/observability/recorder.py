"""What happens with a request when it ends: its decisions are kept, and it is written to the access log and traced."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol

from gateway.observability.decisions import Decisions, RequestRecord
from gateway.observability.ledger import Entry
from gateway.observability.trace_context import TraceContext, read_trace_context


class RecordSink(Protocol):
    """Takes the record of a request that ended. Called on the event loop, so it must not block."""

    def put(self, record: RequestRecord) -> None:
        """Take ``record``, or drop it and count that."""


class TraceSampler(Protocol):
    """Decides whether a request is traced, before it reaches an engine."""

    def begin(self, client: TraceContext | None) -> TraceContext:
        """Return the gateway's own context for a request with the ``client``'s context."""


@dataclass(slots=True)
class Recorder:
    """Follows every accepted request from the opening of its ledger entry to the end of its response."""

    decisions: Decisions = field(default_factory=Decisions)
    sinks: tuple[RecordSink, ...] = ()
    sampler: TraceSampler | None = None

    def opened(self, entry: Entry, traceparent: str | None, tracestate: str | None) -> None:
        """Note that ``entry`` was opened, and give it its trace context. The headers are the client's."""
        if traceparent is not None:
            entry.trace = read_trace_context(traceparent, tracestate)
        if self.sampler is not None:
            entry.trace = self.sampler.begin(entry.trace)
        self.decisions.opened(entry)

    def ended(self, entry: Entry, status: int) -> None:
        """Record the request of ``entry``, which has ended with the response status ``status``."""
        record = RequestRecord.of(entry, status)
        self.decisions.ended(record)
        for sink in self.sinks:
            sink.put(record)
