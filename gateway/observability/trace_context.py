"""W3C trace context: which trace a request belongs to, and the header that passes it on (w3.org/TR/trace-context)."""

from __future__ import annotations

import re
from dataclasses import dataclass

_TRACEPARENT = re.compile(r"(?!ff)[0-9a-f]{2}-(?!0{32})([0-9a-f]{32})-(?!0{16})([0-9a-f]{16})-([0-9a-f]{2})(-.*)?")
_SAMPLED = 1
"""Bit of the flags: the caller records its spans."""

LONGEST_TRACESTATE = 512
"""Characters of ``tracestate`` that are kept, as the recommendation asks for."""


@dataclass(slots=True)
class TraceContext:
    """The trace of one request. Ids are lower-case hex.

    ``parent_id``: the client's span, "" without one. ``span_id``: the gateway's span, "" while tracing is off.
    ``sampled``: the spans are recorded. ``state``: the client's ``tracestate``.
    """

    trace_id: str
    parent_id: str
    span_id: str
    sampled: bool
    state: str

    def traceparent(self) -> bytes:
        """Return the header with which the engine's spans become children of the gateway's span."""
        return f"00-{self.trace_id}-{self.span_id}-{int(self.sampled):02x}".encode()


def read_trace_context(traceparent: str | None, tracestate: str | None = None) -> TraceContext | None:
    """Return the client's trace context; None if it sent none, or a malformed one."""
    if not traceparent:
        return None
    found = _TRACEPARENT.fullmatch(traceparent.strip())
    # Version 00 has exactly four fields; later ones may have more.
    if found is None or (found[4] and traceparent.strip().startswith("00-")):
        return None
    state = (tracestate or "").strip()
    return TraceContext(
        found[1], found[2], "", bool(int(found[3], 16) & _SAMPLED), state if len(state) <= LONGEST_TRACESTATE else ""
    )


def with_traceparent(headers: list[tuple[bytes, bytes]], trace: TraceContext) -> list[tuple[bytes, bytes]]:
    """Return ``headers`` with the gateway's span in ``traceparent``. ``tracestate`` and ``baggage`` stay."""
    kept = [(name, value) for name, value in headers if name.lower() != b"traceparent"]
    return [*kept, (b"traceparent", trace.traceparent())]
