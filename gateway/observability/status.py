"""The current state of the gateway as one JSON document, for `/status` and the built-in dashboard."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from gateway.observability.ledger import OUTCOMES, Entry, Ledger
from gateway.scheduling.engine_queue import EngineQueue

WINDOW_S = 300.0
"""Time over which `/status` reports outcomes and latencies per class, in seconds."""

_MAX_OUTCOMES = 4096
"""Outcomes kept in memory. At more than 13 requests per second they cover less than `WINDOW_S`."""

_MAX_MODELS = 64
"""Models of one engine that `/status` lists."""


@dataclass(frozen=True, slots=True)
class _Ended:
    at: float
    slo_class: str
    outcome: str
    attained: bool
    ttft_s: float | None
    tpot_s: float


@dataclass(slots=True)
class Status:
    """Recent outcomes and the live state of queues, engines and ledger. Never holds prompt or completion text."""

    engine_queues: Sequence[EngineQueue]
    ledger: Ledger
    started: float = field(default_factory=time.monotonic)
    _ended: deque[_Ended] = field(default_factory=lambda: deque(maxlen=_MAX_OUTCOMES))

    def on_close(self, entry: Entry) -> None:
        """Record how a request ended."""
        self._ended.append(
            _Ended(
                time.monotonic(),
                entry.request.slo_class,
                entry.outcome or "",
                entry.attained,
                entry.ttft_s,
                entry.tpot_s,
            )
        )

    def document(self) -> dict[str, Any]:
        """Return the current state, and the outcomes of the last `WINDOW_S` seconds per class."""
        now = time.monotonic()
        recent = [e for e in self._ended if now - e.at <= WINDOW_S]
        return {
            "uptime_s": round(now - self.started, 1),
            "window_s": WINDOW_S,
            "ledger": {
                "accepted": self.ledger.accepted,
                "open": self.ledger.open_count,
                "attained": self.ledger.attained,
                **{outcome: self.ledger.closed[outcome] for outcome in OUTCOMES},
            },
            "classes": {name: self._class(name, recent) for name in self.engine_queues[0].classes},
            "engines": [_engine(engine_queue) for engine_queue in self.engine_queues],
        }

    def _class(self, name: str, recent: list[_Ended]) -> dict[str, Any]:
        ended = [e for e in recent if e.slo_class == name]
        finished = [e for e in ended if e.outcome == "finished"]
        slo = self.engine_queues[0].classes[name].slo
        return {
            "slo_ttft_ms": _ms(slo.ttft_s),
            "slo_tpot_ms": _ms(slo.tpot_s),
            "slo_e2e_ms": _ms(slo.e2e_s),
            "waiting": sum(engine_queue.waiting.by_class[name] for engine_queue in self.engine_queues),
            "running": sum(
                r.slo_class == name for engine_queue in self.engine_queues for r in engine_queue.running.values()
            ),
            "ended": len(ended),
            **{outcome: sum(e.outcome == outcome for e in ended) for outcome in OUTCOMES},
            # All outcomes count in the denominator, as in the definition of SLO adherence.
            "adherence": round(sum(e.attained for e in ended) / len(ended), 4) if ended else None,
            "ttft_p50_ms": _quantile([e.ttft_s for e in finished if e.ttft_s is not None], 0.5),
            "ttft_p99_ms": _quantile([e.ttft_s for e in finished if e.ttft_s is not None], 0.99),
            "tpot_p50_ms": _quantile([e.tpot_s for e in finished], 0.5),
            "tpot_p99_ms": _quantile([e.tpot_s for e in finished], 0.99),
        }


def _engine(engine_queue: EngineQueue) -> dict[str, Any]:
    state = engine_queue.engine.state
    times = state.step_time.times
    circuit, now = engine_queue.circuit, time.monotonic()
    return {
        "name": engine_queue.engine.name,
        "alive": state.alive,
        "model": state.model,
        "models": list(state.models or ())[:_MAX_MODELS],
        "circuit": circuit.current(now),
        "circuit_reason": circuit.reason,
        "rests_for_s": round(max(0.0, circuit.back_at - now), 1) if circuit.state == "open" else 0.0,
        "policy": engine_queue.policy.name,
        "restarts": state.restarts,
        "running": len(engine_queue.running),
        "waiting": len(engine_queue.waiting),
        "kv_usage": round(state.kv_usage, 4),
        "steps_seen": state.step_time.steps_seen,
        "step_base_ms": round(times.d * 1000, 3),
        "step_per_sequence_ms": round(times.b * 1000, 4),
        "prefill_per_token_ms": round(times.alpha * 1000, 4),
    }


def _quantile(values: Sequence[float], q: float) -> float | None:
    ordered = sorted(values)
    return _ms(ordered[min(len(ordered) - 1, int(q * len(ordered)))]) if ordered else None


def _ms(seconds: float | None) -> float | None:
    return None if seconds is None else round(seconds * 1000, 2)
