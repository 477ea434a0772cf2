"""`slack`: past SCORPIO. Feasibility as arithmetic, and under overload the requests that cost least.

The invariant: **what runs can keep its pace, and what waits can still be on time.** With the running set R, its
strictest bound P* = min P_i and the virtual batch V = sum over R of P*/P_i,

    T(V) <= P*                                  the decodes fit their pace (SCORPIO's eq. 8, without its factor eta),
    share = 1 - T(V)/P*                         of time is left for prefill,
    est_k = sum over j <= k of t(p_j) / share   is when the k-th prompt in the queue is done.

A request is admitted only if the first holds with it; it is refused as soon as the last says that its deadline cannot
be met. Who does not fit now never blocks the one behind (skip-over earliest deadline first). When not all can be
served, those go first that take the least time of the engine,

    w_i = t(p_i) + y_i * (cost of one decode at its mean length),

so that the time there is yields the most attained requests. Inside the engine, `slack_gate` gives prefill what
running requests can spare.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass

from engine_adapter.engine import EngineState
from engine_adapter.step_time import StepTimes
from gateway.policies.base import Decision, Runway, reject_tpot, reject_ttft
from gateway.request import Request

_LEAST_SHARE = 0.02
"""However full the batch, prefill goes on: decodes end."""


@dataclass(slots=True)
class Slack:
    """``fill``: the share of P* that the decodes may take.

    ``thrift``: seconds of deadline that a second of engine time counts for when choosing whom to admit (0: deadlines
    alone). ``patience_s``: a request without a TTFT bound is due so long after it came, or it would wait for ever.
    ``optimism``: the share of its estimate by which a prompt is judged too late; the queue ahead of it thins out.
    ``runway_steps``: steps' worth of prompt tokens that may lie in the engine unprefilled.
    """

    fill: float = 1.0
    thrift: float = 200.0
    patience_s: float = 60.0
    optimism: float = 0.8
    runway_steps: float = 2.0
    name: str = "slack"
    gate: str = "slack"

    def order(self, request: Request) -> tuple[float, ...]:
        """Earliest deadline first."""
        return (self._due_s(request), request.arrival_s)

    def decide(
        self, now: float, waiting: Sequence[Request], running: Collection[Request], engine: EngineState
    ) -> Decision:
        """Refuse what cannot be on time, admit the least costly of the rest while everybody keeps pace."""
        decision = Decision()
        load = _Load.of(running)
        runway = Runway.of(running, engine, self.runway_steps)
        feasible = self._refuse_late(now, waiting, load, runway.tokens, engine, decision)
        times = engine.step_time.times
        for request in sorted(feasible, key=lambda r: self._due_s(r) + self.thrift * _cost(r, times)):
            if load.size and load.size + request.sequences > engine.max_num_seqs:
                continue
            if not runway.fits(request):
                continue
            candidate = load.plus(request)
            if candidate.step_seconds(times) > self.fill * candidate.strictest:
                continue
            load = candidate
            decision.admit.append(request)
            runway.add(request)
        return decision

    def _due_s(self, request: Request) -> float:
        return min(request.deadline_s, request.arrival_s + self.patience_s)

    def _refuse_late(
        self,
        now: float,
        waiting: Sequence[Request],
        load: _Load,
        unprefilled: int,
        engine: EngineState,
        decision: Decision,
    ) -> list[Request]:
        """Walk the queue in deadline order; what cannot have its first token in time is refused."""
        times = engine.step_time.times
        busy = load.step_seconds(times) if load.size else 0.0
        share = max(_LEAST_SHARE, 1 - busy / load.strictest)
        work = times.alpha * unprefilled
        kept: list[Request] = []
        least_margin = math.inf
        for request in waiting:
            alone = times.itl(request.sequences, request.length + request.predicted_tokens / 2)
            if request.tpot_slo_s is not None and not request.best_effort and alone > request.tpot_slo_s:
                decision.reject.append(reject_tpot(request, alone, retry_after_s=0.0, hopeless=True))
                continue
            own = times.alpha * request.prompt_tokens
            est = self.optimism * (work + own) / share + busy / 2 + times.beta
            late_by = now + est - request.deadline_s
            if late_by > 0:
                hopeless = own + times.beta > request.ttft_slo_s
                decision.reject.append(
                    reject_ttft(request, now - request.arrival_s + est, request.ttft_slo_s + late_by, late_by, hopeless)
                )
                continue
            work += own
            kept.append(request)
            least_margin = min(least_margin, -late_by)
        if least_margin < math.inf:
            decision.recheck_at = now + least_margin
        return kept


def _cost(request: Request, times: StepTimes) -> float:
    """w_i: seconds of engine time (s), at the margin."""
    tokens = request.predicted_tokens
    decode = times.b + times.a * (request.prompt_tokens + tokens / 2)
    return request.sequences * (times.alpha * request.prompt_tokens + tokens * decode)


@dataclass(slots=True, frozen=True)
class _Load:
    """The running set as sums. Lengths are taken where each request will be half way through what is left of it."""

    size: int = 0
    strictest: float = math.inf
    length: float = 0.0

    @classmethod
    def of(cls, running: Collection[Request]) -> _Load:
        size, strictest, length = 0, math.inf, 0.0
        for r in running:
            size += r.sequences
            left = r.predicted_tokens - r.generated / r.sequences
            length += (r.length + (left if left > 1 else 1.0) / 2) * r.sequences
            bound = r.tpot_slo_s
            if bound is not None and bound < strictest and not r.best_effort:
                strictest = bound
        return cls(size, strictest, length)

    def plus(self, request: Request) -> _Load:
        bound = math.inf if request.tpot_slo_s is None or request.best_effort else request.tpot_slo_s
        length = (request.length + request.predicted_tokens / 2) * request.sequences
        return _Load(self.size + request.sequences, min(self.strictest, bound), self.length + length)

    def step_seconds(self, times: StepTimes) -> float:
        """T of a step in which everybody decodes."""
        return times.itl(self.size, self.length / self.size)
