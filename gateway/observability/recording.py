"""Builds the `Recorder` of a gateway, and its recording of traffic, from the configuration."""

from __future__ import annotations

import os

from gateway.observability.access_log import AccessLog
from gateway.observability.decisions import Decisions
from gateway.observability.recorder import ObservabilityError, Recorder, RecordSink
from gateway.observability.traffic_recording import TrafficRecording


def make_recorder(
    keep: int,
    access_log: bool,
    access_path: str | None,
    tracing: bool,
    endpoint: str | None,
    sample_ratio: float | None,
) -> Recorder:
    """Return what records requests.

    Args:
        keep: ended requests whose decisions are kept.
        access_log, access_path: write the access log, to this file or to stderr.
        tracing, endpoint, sample_ratio: export traces; see `gateway.observability.tracing.Tracer`.

    Raises `ObservabilityError` if the file cannot be opened, or the extra ``otel`` is not installed.
    """
    log = AccessLog(access_path) if access_log else None
    tracer = None
    if tracing and os.environ.get("OTEL_SDK_DISABLED", "").strip().lower() != "true":
        try:
            from gateway.observability.tracing import Tracer
        except ImportError as error:
            raise ObservabilityError(
                f"tracing.enabled: install the extra 'otel' (pip install -e '.[otel]' in your clone): {error}"
            ) from error
        tracer = Tracer(endpoint, sample_ratio)
    sinks: tuple[RecordSink, ...] = tuple(sink for sink in (log, tracer) if sink is not None)
    return Recorder(Decisions(keep), sinks, log, tracer)


def make_recording(path: str | None, max_mb: int) -> TrafficRecording | None:
    """Return what records traffic to ``path``, in files of at most ``max_mb`` MB; None without a path.

    Raises `ObservabilityError` if the file cannot be opened.
    """
    return None if path is None else TrafficRecording(path, max_mb * 1_000_000)
