"""The current state of the gateway as one JSON document, for `/status`, the live feed and the built-in dashboard."""

from __future__ import annotations

import time
from collections import Counter, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, NamedTuple

from gateway import __version__
from gateway.observability.decisions import to_ms
from gateway.observability.ledger import OUTCOMES, Entry, Ledger
from gateway.observability.windows import MAX_TENANTS, OTHER, WINDOWS, Windows
from gateway.scheduling.engine_queue import EngineQueue

WINDOW_S = 300.0
"""Time over which `/status` reports outcomes and latencies per class, in seconds."""

_MAX_OUTCOMES = 4096
"""Finished requests kept in memory. At more than 13 per second the latencies cover less than `WINDOW_S`."""

_MAX_MODELS = 64
"""Models of one engine that `/status` lists."""


class Finished(NamedTuple):
    """A request that finished, and what was predicted for it. Times in seconds, ``at`` monotonic."""

    at: float
    slo_class: str
    attained: bool
    ttft_s: float | None
    tpot_s: float
    predicted_ttft_s: float | None
    pace_s: float | None
    """None without a pace to keep."""


@dataclass(slots=True)
class Status:
    """Recent outcomes and the live state of queues, engines and ledger. Never holds prompt or completion text.

    ``more``: returns further members of the document.
    """

    engine_queues: Sequence[EngineQueue]
    ledger: Ledger
    windows: Windows = field(default_factory=Windows)
    more: Callable[[], dict[str, Any]] = dict
    started: float = field(default_factory=time.monotonic)
    _finished: deque[Finished] = field(default_factory=lambda: deque(maxlen=_MAX_OUTCOMES))

    def on_close(self, entry: Entry) -> None:
        """Record how a request ended."""
        self.windows.on_close(entry)
        if entry.outcome == "finished":
            request = entry.request
            pace_s = request.pace_s if request.generated > request.sequences else None
            self._finished.append(
                Finished(
                    time.monotonic(),
                    request.slo_class,
                    not entry.violated,
                    entry.ttft_s,
                    entry.tpot_s,
                    entry.predicted_ttft_s,
                    pace_s,
                )
            )

    def finished_since(self, at: float, limit: int) -> list[Finished]:
        """Return at most ``limit`` requests that finished after ``at``, oldest first, spread evenly over the time."""
        newest: list[Finished] = []
        for request in reversed(self._finished):
            if request.at <= at:
                break
            newest.append(request)
        stride = -(-len(newest) // limit)
        return newest[:: stride or 1][::-1]

    def document(self) -> dict[str, Any]:
        """Return the current state, and the outcomes and latencies of the last `WINDOW_S` seconds per class."""
        windows = {name: self.windows.document(name) for name in WINDOWS}
        return {
            "version": __version__,
            "uptime_s": round(time.monotonic() - self.started, 1),
            "window_s": WINDOW_S,
            "ledger": {
                "accepted": self.ledger.accepted,
                "open": self.ledger.open_count,
                "attained": self.ledger.attained,
                **{outcome: self.ledger.closed[outcome] for outcome in OUTCOMES},
            },
            "classes": self._classes(windows["5m"]["classes"]),
            "engines": [_engine(engine_queue) for engine_queue in self.engine_queues],
            "tenants": self._tenants(),
            "windows": windows,
            **self.more(),
        }

    def _classes(self, rates: dict[str, Any]) -> dict[str, Any]:
        since = time.monotonic() - WINDOW_S
        finished: dict[str, list[Finished]] = {}
        for request in self._finished:
            if request.at >= since:
                finished.setdefault(request.slo_class, []).append(request)
        waiting: Counter[str] = Counter()
        running: Counter[str] = Counter()
        for engine_queue in self.engine_queues:
            waiting.update(engine_queue.waiting.by_class)
            running.update(request.slo_class for request in engine_queue.running.values())
        classes: dict[str, Any] = {}
        for name, slo_class in self.engine_queues[0].classes.items():
            slo, ended, of_class = slo_class.slo, finished.get(name, []), rates.get(name, {})
            ttft_s = sorted(request.ttft_s for request in ended if request.ttft_s is not None)
            tpot_s = sorted(request.tpot_s for request in ended)
            classes[name] = {
                "slo_ttft_ms": to_ms(slo.ttft_s, 2),
                "slo_tpot_ms": to_ms(slo.tpot_s, 2),
                "slo_e2e_ms": to_ms(slo.e2e_s, 2),
                "waiting": waiting[name],
                "running": running[name],
                "max_waiting": slo_class.max_waiting,
                "ended": of_class.get("ended", 0),
                **{outcome: of_class.get(outcome, 0) for outcome in OUTCOMES},
                "adherence": of_class.get("adherence"),
                "ttft_p50_ms": _quantile(ttft_s, 0.5),
                "ttft_p99_ms": _quantile(ttft_s, 0.99),
                "tpot_p50_ms": _quantile(tpot_s, 0.5),
                "tpot_p99_ms": _quantile(tpot_s, 0.99),
            }
        return classes

    def _tenants(self) -> dict[str, dict[str, int]]:
        """Return the waiting and running requests of the tenants that have the most of them."""
        waiting: Counter[str] = Counter()
        running: Counter[str] = Counter()
        for engine_queue in self.engine_queues:
            waiting.update(request.tenant for request in engine_queue.waiting)
            running.update(request.tenant for request in engine_queue.running.values())
        names = [name for name, _ in (waiting + running).most_common()]
        tenants = {name: {"waiting": waiting[name], "running": running[name]} for name in names[:MAX_TENANTS]}
        others = names[MAX_TENANTS:]
        if others:
            tenants[OTHER] = {
                "waiting": sum(waiting[name] for name in others),
                "running": sum(running[name] for name in others),
            }
        return tenants


def _engine(engine_queue: EngineQueue) -> dict[str, Any]:
    state = engine_queue.engine.state
    times = state.step_time.times
    circuit, now = engine_queue.circuit, time.monotonic()
    return {
        "name": engine_queue.engine.name,
        "alive": state.alive,
        "model": state.model,
        "models": list(islice(state.models or (), _MAX_MODELS)),
        "circuit": circuit.current(now),
        "circuit_reason": circuit.reason,
        "rests_for_s": round(max(0.0, circuit.back_at - now), 1) if circuit.state == "open" else 0.0,
        "policy": engine_queue.policy.name,
        "restarts": state.restarts,
        "running": len(engine_queue.running),
        "waiting": len(engine_queue.waiting),
        "slots": state.max_num_seqs,
        "foreign": state.foreign_sequences,
        "kv_usage": round(state.kv_usage, 4),
        "reports": state.reports.source,
        "report_age_ms": None if state.reports.at is None else round(1000 * (now - state.reports.at), 1),
        "steps_seen": state.step_time.steps_seen,
        "handover_ms": round(1000 * state.handover_s, 3),
        "step_base_ms": round(times.d * 1000, 3),
        "step_per_sequence_ms": round(times.b * 1000, 4),
        "prefill_per_token_ms": round(times.alpha * 1000, 4),
    }


def _quantile(ordered: Sequence[float], q: float) -> float | None:
    return to_ms(ordered[min(len(ordered) - 1, int(q * len(ordered)))], 2) if ordered else None
