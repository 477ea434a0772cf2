"""What the gateway is doing right now, as one JSON document: behind `/status` and the built-in dashboard."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from gateway.observability.ledger import OUTCOMES, Entry, Ledger
from gateway.scheduling.engine_queue import EngineQueue

WINDOW_S = 300.0
_KEPT = 4096


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
    """Recent outcomes, and the live state of lanes and ledger. Times and sizes only; no text."""

    engine_queues: Sequence[EngineQueue]
    ledger: Ledger
    started: float = field(default_factory=time.monotonic)
    _ended: deque[_Ended] = field(default_factory=lambda: deque(maxlen=_KEPT))

    def on_close(self, entry: Entry) -> None:
        """Remember how a request ended."""
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
        """The state now; per class, the last `WINDOW_S` seconds."""
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
        mine = [e for e in recent if e.slo_class == name]
        finished = [e for e in mine if e.outcome == "finished"]
        slo = self.engine_queues[0].classes[name].slo
        return {
            "slo_ttft_ms": _ms(slo.ttft_s),
            "slo_tpot_ms": _ms(slo.tpot_s),
            "slo_e2e_ms": _ms(slo.e2e_s),
            "waiting": sum(engine_queue.waiting.by_class[name] for engine_queue in self.engine_queues),
            "running": sum(
                r.slo_class == name for engine_queue in self.engine_queues for r in engine_queue.running.values()
            ),
            "ended": len(mine),
            **{outcome: sum(e.outcome == outcome for e in mine) for outcome in OUTCOMES},
            # Rejected and failed requests stay in the denominator.
            "adherence": round(sum(e.attained for e in mine) / len(mine), 4) if mine else None,
            "ttft_p50_ms": _quantile([e.ttft_s for e in finished if e.ttft_s is not None], 0.5),
            "ttft_p99_ms": _quantile([e.ttft_s for e in finished if e.ttft_s is not None], 0.99),
            "tpot_p50_ms": _quantile([e.tpot_s for e in finished], 0.5),
            "tpot_p99_ms": _quantile([e.tpot_s for e in finished], 0.99),
        }


def _engine(engine_queue: EngineQueue) -> dict[str, Any]:
    state = engine_queue.engine.state
    times = state.step_time.times
    return {
        "name": engine_queue.engine.name,
        "alive": state.alive,
        "model": state.model,
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
