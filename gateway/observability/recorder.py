"""What happens with a request when it ends: its decisions are kept, and it is written to the access log and traced."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Protocol

from gateway.observability.decisions import Decisions, RequestRecord
from gateway.observability.ledger import Entry
from gateway.observability.trace_context import TraceContext, read_trace_context


class ObservabilityError(Exception):
    """The access log or the traces cannot start; the message says what to fix."""


@dataclass(slots=True)
class UnscheduledRecord:
    """A request that was passed through, or refused before it was accepted. As `RequestRecord`, where names agree."""

    client_id: str
    tenant: str
    route: str
    status: int
    time: float
    ended_at: float
    trace_id: str


class RecordSink(Protocol):
    """Takes the record of a request that ended. Called on the event loop, so `put` must not block."""

    name: str

    @property
    def dropped(self) -> int:
        """Records that were dropped."""

    def put(self, record: RequestRecord) -> None:
        """Take ``record``, or drop it and count that."""

    def close(self) -> None:
        """Handle the waiting records, within a few seconds. May block."""


class UnscheduledSink(Protocol):
    """Takes the records of requests that were not scheduled."""

    def put_unscheduled(self, record: UnscheduledRecord) -> None:
        """Take ``record``, or drop it and count that."""


class TrafficSink(Protocol):
    """Takes the requests that ended, with what only their ledger entry has: the blocks of the prompt."""

    name: str

    @property
    def dropped(self) -> int:
        """Requests that were dropped."""

    def put(self, record: RequestRecord, entry: Entry) -> None:
        """Take the request of ``entry``, or drop it and count that. Must not block, nor keep ``entry``."""

    def close(self) -> None:
        """Handle the waiting requests, within a few seconds. May block."""


class TraceSampler(Protocol):
    """Decides whether a request is traced, before it reaches an engine."""

    def begin(self, client: TraceContext | None) -> TraceContext:
        """Return the gateway's own context for a request with the ``client``'s context."""


@dataclass(slots=True)
class Recorder:
    """Follows every accepted request from the opening of its ledger entry to the end of its response."""

    decisions: Decisions = field(default_factory=Decisions)
    sinks: tuple[RecordSink, ...] = ()
    unscheduled: UnscheduledSink | None = None
    sampler: TraceSampler | None = None
    traffic: TrafficSink | None = None

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
        if self.traffic is not None:
            self.traffic.put(record, entry)

    def ended_unscheduled(
        self, client_id: str, tenant: str, route: str, status: int, arrival_s: float, traceparent: str | None
    ) -> None:
        """Record a request that was not scheduled. It arrived at ``arrival_s`` (monotonic s)."""
        if self.unscheduled is not None:
            seconds, trace = time.monotonic() - arrival_s, read_trace_context(traceparent)
            trace_id = "" if trace is None else trace.trace_id
            record = UnscheduledRecord(client_id, tenant, route, status, time.time() - seconds, seconds, trace_id)
            self.unscheduled.put_unscheduled(record)

    def close(self) -> None:
        """Close the sinks. Blocks for a few seconds at most."""
        for sink in self.sinks:
            sink.close()
        if self.traffic is not None:
            self.traffic.close()
