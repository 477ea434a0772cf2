"""Mooncake's early rejection (Qin et al., 2024, section 7), as SCORPIO's evaluation takes it for a baseline.

A request is judged once, when it arrives: by the time to first token that the prefills ahead of it leave, and by the
time per token of the batch it would decode in. What passes goes to the engine at once, first come first served.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

from engine_adapter.engine import EngineState
from gateway.policies.base import UNGATED, Decision, prefill_backlog, reject_tpot, reject_ttft
from gateway.requests.request import Request


@dataclass(slots=True)
class Mooncake:
    """Rejects at arrival what its predicted TTFT or TPOT would break; gates nothing.

    ``tpot_check`` False leaves the first of the two: what SCORPIO's authors ran under this name.
    """

    tpot_check: bool = True
    name: str = "mooncake"
    gate: str = UNGATED

    def order(self, request: Request) -> tuple[float, ...]:
        """By arrival."""
        return (request.arrival_s,)

    def decide(
        self, now: float, waiting: Sequence[Request], running: Collection[Request], engine: EngineState
    ) -> Decision:
        """Judge each newcomer behind those judged before it."""
        decision = Decision()
        backlog_s = prefill_backlog(running, engine)
        sequences = sum([r.sequences for r in running])
        tokens = sum([r.prompt_tokens * r.sequences + r.generated for r in running])
        for request in waiting:
            prefill_s = engine.step_time.prefill(request.prompt_tokens)
            ttft_s = now - request.arrival_s + backlog_s + prefill_s
            batch = sequences + request.sequences
            length = (tokens + request.length * request.sequences) / batch
            tpot_s = engine.step_time.itl(batch, length + request.predicted_tokens / 2)
            if ttft_s > request.ttft_slo_s:
                late_s = ttft_s - request.ttft_slo_s
                infeasible = prefill_s > request.ttft_slo_s
                decision.reject.append(reject_ttft(request, ttft_s, ttft_s, late_s, infeasible))
            elif self.tpot_check and breaks_its_own_tpot(request, tpot_s):
                alone_s = engine.step_time.itl(request.sequences, request.length + request.predicted_tokens / 2)
                infeasible = breaks_its_own_tpot(request, alone_s)
                decision.reject.append(reject_tpot(request, tpot_s, 1.0, infeasible))
            else:
                decision.admit.append(request)
                backlog_s += prefill_s
                sequences = batch
                tokens += request.prompt_tokens * request.sequences
        return decision


def breaks_its_own_tpot(request: Request, tpot_s: float) -> bool:
    """Whether ``tpot_s`` breaks a bound that somebody insists on."""
    return request.pace_s is not None and not request.best_effort and tpot_s > request.pace_s
