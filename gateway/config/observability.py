"""Sections of logs, traces and the records of requests."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from gateway.config.section import URL_PATTERN, Section


class LoggingConfig(Section):
    """Structured logs on stderr. They never contain prompt or completion text."""

    level: Literal["debug", "info", "warning", "error"] = "info"
    format: Literal["text", "json"] = "text"
    access: Literal["none", "json"] = Field("none", description="One line of JSON for each request under /v1.")
    access_path: str | None = Field(None, min_length=1, description="File of the access log; null writes to stderr.")


class TracingConfig(Section):
    """OpenTelemetry traces over OTLP/HTTP (extra ``otel``). ``OTEL_*`` environment variables fill what is not set."""

    enabled: bool = False
    endpoint: str | None = Field(None, pattern=URL_PATTERN, description="The collector's base URL.")
    sample_ratio: float | None = Field(
        None, ge=0, le=1, description="Of the requests whose client sends no trace context."
    )


class RecordingConfig(Section):
    """A recording of the traffic for `antares simulate --trace` (docs/planning.md). It never contains text."""

    path: str | None = Field(None, min_length=7, pattern=r"\.jsonl$", description="File of the recording; null: none.")
    max_mb: int = Field(256, ge=1, le=1_000_000, description="Size at which the file is renamed to NAME.1.jsonl.")


class DecisionsConfig(Section):
    """The records of ended requests, for `antares explain` (docs/observability.md). They never contain text."""

    keep: int = Field(10_000, ge=0, le=100_000, description="Records that are kept, about 1.3 kB each.")


class WantedReplicasConfig(Section):
    """How many engines recent traffic needs, for autoscalers (docs/kubernetes.md)."""

    enabled: bool = False
    target: float = Field(0.99, gt=0, le=1, description="Share of the requests that must attain their SLO.")
    window_s: float = Field(300.0, ge=10, le=3600, description="Requests that arrived in this time are simulated.")
    interval_s: float = Field(60.0, ge=5, le=3600, description="Pause between two simulations.")
    max_replicas: int = Field(64, ge=1, le=1024, description="Most replicas that are wanted.")
