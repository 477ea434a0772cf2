"""Mooncake's early rejection (Qin et al., 2024, section 7), a baseline of SCORPIO's evaluation.

Each request is judged once, at arrival. With the prefill backlog W (s) of the requests before it, and the batch of B
sequences of mean length L that it would decode in (itself included):

    TTFT_est = (now - a_i) + W + t(p_i)         reject if above T_i,
    TPOT_est = ITL(B, L + y_i/2)                reject if above P_i.

Request i has arrival a_i, prompt length p_i, predicted output length y_i, TTFT bound T_i and TPOT bound P_i. The step
times t and ITL are those of SCORPIO eq. 6 and 4. The engine serves the admitted requests first come, first served.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

from engine_adapter.engine import EngineState
from gateway.policies.base import UNGATED, Decision, prefill_backlog, reject_tpot, reject_ttft
from gateway.requests.request import Request


@dataclass(slots=True)
class Mooncake:
    """Rejects a request at arrival if its predicted TTFT or TPOT exceeds its own bound; uses no step gate.

    Args:
        tpot_check: whether to check TPOT_est too. SCORPIO's authors ran Mooncake without it.
    """

    tpot_check: bool = True
    name: str = "mooncake"
    gate: str = UNGATED

    def order(self, request: Request) -> tuple[float, ...]:
        """Sort by arrival."""
        return (request.arrival_s,)

    def decide(
        self, now: float, waiting: Sequence[Request], running: Collection[Request], engine: EngineState
    ) -> Decision:
        """Admit or reject every waiting request; an admitted one adds to the backlog and batch of the next."""
        decision = Decision()
        backlog_s = prefill_backlog(running, engine)
        sequences = sum([r.sequences for r in running])
        tokens = sum([r.prompt_tokens * r.sequences + r.generated for r in running])
        for request in waiting:
            prefill_s = engine.step_time.prefill(request.uncached_tokens)
            ttft_s = now - request.arrival_s + backlog_s + prefill_s
            batch = sequences + request.sequences
            mean_length = (tokens + request.length * request.sequences) / batch
            tpot_s = engine.step_time.itl(batch, mean_length + request.predicted_tokens / 2)
            if ttft_s > request.ttft_slo_s:
                late_s = ttft_s - request.ttft_slo_s
                infeasible = prefill_s > request.ttft_slo_s
                decision.reject.append(reject_ttft(request, ttft_s, ttft_s, late_s, infeasible))
            elif self.tpot_check and _exceeds_tpot_slo(request, tpot_s):
                alone_s = engine.step_time.itl(request.sequences, request.length + request.predicted_tokens / 2)
                infeasible = _exceeds_tpot_slo(request, alone_s)
                decision.reject.append(reject_tpot(request, tpot_s, 1.0, infeasible))
            else:
                decision.admit.append(request)
                backlog_s += prefill_s
                sequences = batch
                tokens += request.prompt_tokens * request.sequences
        return decision


def _exceeds_tpot_slo(request: Request, tpot_s: float) -> bool:
    """Whether ``tpot_s`` breaks the TPOT bound of ``request``; never true for a best-effort request."""
    return request.pace_s is not None and not request.bounds_waived and tpot_s > request.pace_s
