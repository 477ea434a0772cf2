"""The SLO report: headers at the first byte of a response, and on request the full report at its end."""

from __future__ import annotations

from typing import Any

import orjson

from gateway.api.errors import Headers
from gateway.observability.decisions import to_ms
from gateway.observability.ledger import Entry

REPORT_HEADER = "x-slo-report"


def first_byte_headers(entry: Entry, ttft_s: float | None) -> Headers:
    """Return ``x-antares-queue-ms``, ``-predicted-ttft-ms`` and ``-ttft-ms``, each only if its value is known."""
    known = (
        (b"x-antares-queue-ms", entry.queue_s),
        (b"x-antares-predicted-ttft-ms", entry.predicted_ttft_s),
        (b"x-antares-ttft-ms", ttft_s),
    )
    return [(name, b"%.1f" % (seconds * 1000)) for name, seconds in known if seconds is not None]


def slo_report(entry: Entry) -> dict[str, Any]:
    """Return the full report: measured latencies and bounds, attained or not, predicted and actual output length."""
    request, slo = entry.request, entry.request.slo
    violated = slo.violated(entry.ttft_s, entry.tpot_s, entry.e2e_s)
    return {
        "slo_class": request.slo_class,
        "attained": not violated,
        "violated": list(violated),
        "ttft_ms": to_ms(entry.ttft_s),
        "tpot_ms": to_ms(entry.tpot_s),
        "e2e_ms": to_ms(entry.e2e_s),
        "queue_ms": to_ms(entry.queue_s),
        "slo_ttft_ms": to_ms(slo.ttft_s),
        "slo_tpot_ms": to_ms(slo.tpot_s),
        "slo_e2e_ms": to_ms(slo.e2e_s),
        "predicted_ttft_ms": to_ms(entry.predicted_ttft_s),
        "predicted_tokens": round(request.predicted_at_arrival, 1),
        "output_tokens": request.generated,
        "best_effort": request.bounds_waived,
        "engine": entry.engine,
    }


def sse_comment(entry: Entry) -> bytes:
    """Return the report as an SSE comment, which clients that do not know it ignore."""
    return b": antares " + orjson.dumps(slo_report(entry)) + b"\n\n"


def with_slo_report(body: bytes, entry: Entry) -> bytes:
    """Return a JSON object with the report as its ``antares`` member. Any other ``body`` is returned unchanged."""
    try:
        document = orjson.loads(body)
    except orjson.JSONDecodeError:
        return body
    if not isinstance(document, dict):
        return body
    document["antares"] = slo_report(entry)
    return orjson.dumps(document)
