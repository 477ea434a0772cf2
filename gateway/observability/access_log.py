"""The access log: one line of JSON for each request under ``/v1``, without text and keys, to stderr or a file."""

from __future__ import annotations

import sys
from datetime import UTC, datetime
from typing import Any

import orjson

from gateway.observability.background import BackgroundQueue
from gateway.observability.decisions import RequestRecord, to_ms
from gateway.observability.line_file import LineFile
from gateway.observability.recorder import UnscheduledRecord

CLOSE_S = 3.0
"""Seconds that a shutdown waits for the last lines to be written. Convention."""


class AccessLog:
    """Writes a line for each record, in a thread. ``path``: None writes to stderr.

    Raises `ObservabilityError` if the file cannot be opened (`LineFile`).
    """

    name = "access_log"

    def __init__(self, path: str | None) -> None:
        self._file = None if path is None else LineFile(path, "logging.access_path")
        self._queue: BackgroundQueue[RequestRecord | UnscheduledRecord] = BackgroundQueue("access log", self._write)

    @property
    def dropped(self) -> int:
        """Lines that were not written, because the queue was full or a write failed."""
        return self._queue.dropped

    def put(self, record: RequestRecord) -> None:
        """Write a line for ``record``."""
        self._queue.put(record)

    def put_unscheduled(self, record: UnscheduledRecord) -> None:
        """Write a line for a request that was not scheduled."""
        self._queue.put(record)

    def close(self) -> None:
        """Write the waiting lines, within `CLOSE_S`, and accept no more."""
        self._queue.close(CLOSE_S)

    def _write(self, records: list[RequestRecord | UnscheduledRecord]) -> None:
        lines = b"".join(orjson.dumps(line_of(record), option=orjson.OPT_APPEND_NEWLINE) for record in records)
        if self._file is None:
            sys.stderr.buffer.write(lines)
            sys.stderr.buffer.flush()
        else:
            self._file.append(lines)


def line_of(record: RequestRecord | UnscheduledRecord) -> dict[str, Any]:
    """Return one line of the log. Members without a value are null; those of scheduling are absent without it."""
    line: dict[str, Any] = {
        "time": datetime.fromtimestamp(record.time, UTC).isoformat(timespec="milliseconds"),
        "request_id": record.client_id,
        "tenant": record.tenant or None,
        "route": record.route,
        "status": record.status,
        "trace_id": record.trace_id or None,
        "duration_ms": to_ms(record.ended_at),
    }
    if isinstance(record, UnscheduledRecord):
        return line
    slo = record.slo
    return line | {
        "id": record.id,
        "slo_class": record.slo_class,
        "model": record.model,
        "engine": record.engine or None,
        "attempts": len(record.attempts),
        "outcome": record.outcome,
        "reason": record.reason or None,
        "violated": record.violated,
        "best_effort": record.bounds_waived,
        "slo_ttft_ms": to_ms(slo.ttft_s),
        "slo_tpot_ms": to_ms(slo.tpot_s),
        "slo_e2e_ms": to_ms(slo.e2e_s),
        "queue_ms": to_ms(record.queue_s),
        "predicted_ttft_ms": to_ms(record.predicted_ttft_s),
        "ttft_ms": to_ms(record.ttft_s),
        "tpot_ms": to_ms(record.tpot_s),
        "e2e_ms": to_ms(record.e2e_s),
        "stream": record.stream,
        "prompt_tokens": record.prompt_tokens,
        "cached_tokens": record.cached_tokens,
        "output_tokens": record.output_tokens,
    }
