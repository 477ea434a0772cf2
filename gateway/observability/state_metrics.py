"""Prometheus metrics of the gateway's state: queues, engines, step-time models and shadows, read at each scrape."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from engine_adapter.engine import EngineState
from engine_adapter.step_report import ReportLog
from gateway.observability.ledger import Ledger
from gateway.observability.recorder import RecordSink, TrafficSink
from gateway.observability.windows import Windows
from gateway.scheduling.engine_queue import EngineQueue
from gateway.scheduling.shadow import Shadow

_WINDOW = ("slo_class", "tenant", "window")

STATE_METRICS: dict[str, tuple[type[CounterMetricFamily] | type[GaugeMetricFamily], str, tuple[str, ...]]] = {
    "antares_adherence_ratio": (
        GaugeMetricFamily, "Attained / ended requests in the window; cancelled ones do not count.", _WINDOW,
    ),
    "antares_goodput_requests_per_second": (
        GaugeMetricFamily, "Requests that attained their SLO, per second of the window.", _WINDOW,
    ),
    "antares_arrival_requests_per_second": (
        GaugeMetricFamily, "Accepted requests per second of the window.", _WINDOW,
    ),
    "antares_output_tokens_per_second": (
        GaugeMetricFamily, "Output tokens of requests that ended, per second of the window.", _WINDOW,
    ),
    "antares_ledger_open": (GaugeMetricFamily, "Accepted requests that have not ended.", ()),
    "antares_waiting_requests": (GaugeMetricFamily, "Requests that wait for admission.", ("slo_class", "engine")),
    "antares_running_requests": (GaugeMetricFamily, "Requests that the engine serves.", ("slo_class", "engine")),
    "antares_engine_up": (GaugeMetricFamily, "1 while the engine can serve, else 0.", ("engine",)),
    "antares_engine_starting": (
        GaugeMetricFamily, "1 for an engine that was added or changed and has not served yet.", ("engine",),
    ),
    "antares_engine_circuit": (
        GaugeMetricFamily, "1 for the state of the engine's circuit breaker, else 0.", ("engine", "state"),
    ),
    "antares_engine_rests_total": (CounterMetricFamily, "Times that the engine's circuit opened.", ("engine",)),
    "antares_engine_hangs_total": (
        CounterMetricFamily, "Times that the engine computed no step although it had work.", ("engine",),
    ),
    "antares_engine_restarts_total": (CounterMetricFamily, "Restarts of the engine.", ("engine",)),
    "antares_engine_running_sequences": (GaugeMetricFamily, "Sequences that the engine runs.", ("engine",)),
    "antares_engine_waiting_sequences": (GaugeMetricFamily, "Sequences in the engine's own queue.", ("engine",)),
    "antares_engine_foreign_sequences": (
        GaugeMetricFamily,
        "Sequences that the engine runs for others than this gateway, by its reports.",
        ("engine",),
    ),
    "antares_engine_kv_usage_ratio": (GaugeMetricFamily, "Fraction of KV cache memory in use.", ("engine",)),
    "antares_engine_reports_total": (
        CounterMetricFamily, "Reports of a remote engine: from its report channel, or from its /metrics.",
        ("engine", "source"),
    ),
    "antares_engine_reports_dropped_total": (
        CounterMetricFamily, "Reports that the server dropped on this connection: they could not be sent in time.",
        ("engine",),
    ),
    "antares_engine_steps_total": (CounterMetricFamily, "Engine steps seen by the step-time model.", ("engine",)),
    "antares_step_seconds_total": (
        CounterMetricFamily, "Duration of engine steps: actual, and as the step-time model predicted it.",
        ("engine", "kind"),
    ),
    "antares_step_error_seconds_total": (
        CounterMetricFamily, "Absolute differences of actual and predicted durations of engine steps.", ("engine",),
    ),
    "antares_step_time_coefficient": (
        GaugeMetricFamily,
        "Coefficients of ITL(B,L)=aBL+bB+cL+d and t(p)=delta if p<theta else alpha*p+beta (s, tokens).",
        ("engine", "name"),
    ),
    "antares_step_time_r2": (GaugeMetricFamily, "R2 of the latest step-time fit.", ("engine", "form")),
    "antares_step_time_rmse_seconds": (GaugeMetricFamily, "RMSE of the latest step-time fit.", ("engine", "form")),
    "antares_step_time_mape_ratio": (GaugeMetricFamily, "MAPE of the latest step-time fit.", ("engine", "form")),
    "antares_gate_steps_total": (
        CounterMetricFamily, "Engine steps in which a sequence sat out.", ("engine",),
    ),
    "antares_gate_eligible_total": (
        CounterMetricFamily, "Decode opportunities of requests with this pace.", ("engine", "tpot_ms"),
    ),
    "antares_gate_batched_total": (
        CounterMetricFamily, "Decode opportunities that the step gate granted.", ("engine", "tpot_ms"),
    ),
    "antares_best_effort_preemptions_total": (
        CounterMetricFamily,
        "Best-effort requests that the engine preempted for paced and deadline-only ones. It recomputes them later.",
        ("engine",),
    ),
    "antares_draft_tokens_total": (
        CounterMetricFamily, "Drafts (speculative decoding) that the engine verified, and those that were accepted.",
        ("engine", "kind"),
    ),
    "antares_gate_seconds_total": (CounterMetricFamily, "Time spent in the step gate.", ("engine",)),
    "antares_shadow_up": (GaugeMetricFamily, "1 while the shadow policy runs, else 0.", ("policy", "engine")),
    "antares_shadow_requests_total": (
        CounterMetricFamily, "Requests by the decision of the shadow policy (docs/shadow.md).",
        ("policy", "engine", "slo_class", "outcome", "reason"),
    ),
    "antares_shadow_agreement_total": (
        CounterMetricFamily, "Requests by the decisions of the active and of the shadow policy.",
        ("policy", "engine", "active", "shadow"),
    ),
    "antares_shadow_waiting_requests": (
        GaugeMetricFamily, "Requests that wait in the shadow policy's simulation.", ("policy", "engine"),
    ),
    "antares_shadow_running_requests": (
        GaugeMetricFamily, "Requests that run in the shadow policy's simulation.", ("policy", "engine"),
    ),
    "antares_shadow_decisions_total": (CounterMetricFamily, "Decisions of the shadow policy.", ("policy", "engine")),
    "antares_shadow_seconds_total": (CounterMetricFamily, "Time spent in the shadow policy.", ("policy", "engine")),
}  # fmt: skip
"""Metrics read at scrape time: name to (type, help, labels)."""

METRIC_ALIASES = {
    "antares_gate_put_aside_total": "antares_best_effort_preemptions_total",
    "antares_shadow_looks_total": "antares_shadow_decisions_total",
}
"""Metric names of version 0.1 to their current names. Both are exported until version 0.3."""

_AGREEMENT = [(active, shadow) for active in ("admitted", "rejected") for shadow in ("admitted", "rejected")]


class DroppedRecords(Collector):
    """Counts the records that the ``sinks`` lost: access log, traces and recording, as far as they are on."""

    def __init__(self) -> None:
        self.sinks: Sequence[RecordSink | TrafficSink] = ()

    def collect(self) -> Iterable[Metric]:
        """Return the count of each sink."""
        text = "Requests that the access log, the traces or the recording lost, to delay no response."
        family = CounterMetricFamily("antares_records_dropped_total", text, labels=("sink",))
        dropped = {"access_log": 0, "traces": 0, "recording": 0} | {sink.name: sink.dropped for sink in self.sinks}
        for name, count in dropped.items():
            family.add_metric((name,), count)
        yield family


class GatewayState(Collector):
    """Collects `STATE_METRICS`. ``starting``: returns the queues of engines that have not served yet."""

    def __init__(
        self,
        engine_queues: Sequence[EngineQueue],
        starting: Callable[[], Iterable[EngineQueue]],
        ledger: Ledger,
        windows: Windows,
    ) -> None:
        self._engine_queues = engine_queues
        self._starting = starting
        self._ledger = ledger
        self._windows = windows

    def collect(self) -> Iterable[Metric]:
        """Return the current values, under their old names too."""
        families = {name: kind(name, text, labels=labels) for name, (kind, text, labels) in STATE_METRICS.items()}
        aliases = {}
        for old, new in METRIC_ALIASES.items():
            kind, _, labels = STATE_METRICS[new]
            aliases[new] = kind(old, f"Deprecated: use {new}; removed in 0.3.", labels=labels)

        def put(name: str, value: float, *labels: str) -> None:
            families[name].add_metric(labels, value)
            if name in aliases:
                aliases[name].add_metric(labels, value)

        now = time.monotonic()
        put("antares_ledger_open", self._ledger.open_count)
        for name, value, labels in self._windows.gauges():
            put(name, value, *labels)
        for engine_queue in self._starting():
            put("antares_engine_starting", 1, engine_queue.engine.name)
        for engine_queue in self._engine_queues:
            engine, state = engine_queue.engine.name, engine_queue.engine.state
            for slo_class in engine_queue.classes:
                put("antares_waiting_requests", engine_queue.waiting.by_class[slo_class], slo_class, engine)
                running = sum(r.slo_class == slo_class for r in engine_queue.running.values())
                put("antares_running_requests", running, slo_class, engine)
            put("antares_engine_up", state.alive, engine)
            put("antares_engine_hangs_total", state.hangs, engine)
            put("antares_engine_restarts_total", state.restarts, engine)
            put("antares_engine_rests_total", engine_queue.circuit.opened, engine)
            for name, is_current in engine_queue.circuit.states(now).items():
                put("antares_engine_circuit", is_current, engine, name)
            _put_queue(put, engine, state)
            _put_reports(put, engine, state.reports)
            put("antares_engine_steps_total", state.step_time.steps_seen, engine)
            put("antares_step_seconds_total", state.step_time.actual_s, engine, "actual")
            put("antares_step_seconds_total", state.step_time.predicted_s, engine, "predicted")
            put("antares_step_error_seconds_total", state.step_time.error_s, engine)
            for name in ("a", "b", "c", "d", "alpha", "beta", "theta", "delta"):
                put("antares_step_time_coefficient", getattr(state.step_time.times, name), engine, name)
            for form, quality in (
                ("itl", state.step_time.itl_quality),
                ("prefill", state.step_time.prefill_quality),
                ("curve", state.step_time.curve_quality),
            ):
                if quality is not None:
                    put("antares_step_time_r2", quality.r2, engine, form)
                    put("antares_step_time_rmse_seconds", quality.rmse_s, engine, form)
                    put("antares_step_time_mape_ratio", quality.mape, engine, form)
            put("antares_gate_steps_total", state.gate.gated_steps, engine)
            put("antares_best_effort_preemptions_total", state.gate.best_effort_preemptions, engine)
            put("antares_draft_tokens_total", state.acceptance.draft_tokens, engine, "verified")
            put("antares_draft_tokens_total", state.acceptance.accepted_tokens, engine, "accepted")
            put("antares_gate_seconds_total", state.gate.gate_seconds, engine)
            for tpot, count in state.gate.eligible.items():
                put("antares_gate_eligible_total", count, engine, tpot)
                put("antares_gate_batched_total", state.gate.batched.get(tpot, 0), engine, tpot)
            for shadow in engine_queue.shadows.all:
                _put_shadow(put, engine, shadow)
        return [*families.values(), *aliases.values()]


def _put_queue(put: Callable[..., None], engine: str, state: EngineState) -> None:
    put("antares_engine_running_sequences", state.engine_running, engine)
    put("antares_engine_waiting_sequences", state.engine_waiting, engine)
    put("antares_engine_foreign_sequences", state.foreign_sequences, engine)
    put("antares_engine_kv_usage_ratio", state.kv_usage, engine)


def _put_shadow(put: Callable[..., None], engine: str, shadow: Shadow) -> None:
    source = (shadow.name, engine)
    put("antares_shadow_up", shadow.up, *source)
    put("antares_shadow_waiting_requests", shadow.waiting, *source)
    put("antares_shadow_running_requests", shadow.running, *source)
    put("antares_shadow_decisions_total", shadow.updates, *source)
    put("antares_shadow_seconds_total", shadow.seconds, *source)
    for (slo_class, outcome, reason), count in list(shadow.outcomes.items()):
        put("antares_shadow_requests_total", count, *source, slo_class, outcome, reason)
    for decisions in _AGREEMENT:
        put("antares_shadow_agreement_total", shadow.agreement[decisions], *source, *decisions)


def _put_reports(put: Callable[..., None], engine: str, reports: ReportLog) -> None:
    for source, count in reports.counts.items():
        put("antares_engine_reports_total", count, engine, source)
    put("antares_engine_reports_dropped_total", reports.dropped, engine)
