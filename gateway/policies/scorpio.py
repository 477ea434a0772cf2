"""SCORPIO: serving the right requests at the right time for heterogeneous SLOs (section 3 of the paper).

Two guards over one queue. The *TTFT guard* (section 3.3) orders by least deadline first and rejects what its deadline
can no longer meet. The *TPOT guard* (section 3.4) admits a request only if no running request's TPOT bound breaks by
it, with the batch counted at its virtual size; its other half, credit-based batching, runs inside the engine
(`engine_adapter.gates.base.CreditGate`).

Where the authors' code departs from the paper, this follows the paper: a request that does not fit now never blocks the
one behind it, rejection walks the queue in deadline order, and nothing admitted is ever rejected.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass

from engine_adapter.engine import EngineState
from engine_adapter.step_time.model import StepTimeModel
from gateway.policies.base import UNGATED, Decision, PrefillLookahead, prefill_backlog, reject_tpot, reject_ttft
from gateway.requests.request import Request


@dataclass(slots=True)
class Scorpio:
    """Both guards, each switchable.

    ``eta`` is the paper's inefficiency coefficient (the authors' code: 1.3). ``slack_s`` is kept in hand before a TTFT
    deadline (the authors' code: 50 ms). ``prefill_lookahead_steps`` bounds how many steps' worth of prompt tokens
    may lie in the
    engine unprefilled: order is kept here, so the engine's own queue stays short.
    """

    eta: float = 1.3
    slack_s: float = 0.05
    ttft_guard: bool = True
    tpot_guard: bool = True
    prefill_lookahead_steps: float = 2.0
    name: str = "scorpio"

    @property
    def gate(self) -> str:
        """Credit-based batching is part of the TPOT guard."""
        return "credit" if self.tpot_guard else UNGATED

    def order(self, request: Request) -> tuple[float, ...]:
        """Least deadline first; without the TTFT guard, by arrival."""
        return (request.deadline_s, request.arrival_s) if self.ttft_guard else (request.arrival_s,)

    def decide(
        self, now: float, waiting: Sequence[Request], running: Collection[Request], engine: EngineState
    ) -> Decision:
        """Walk the queue, least deadline first: reject the unattainable, admit what the running batch can bear."""
        decision = Decision()
        queue: Sequence[Request] = waiting
        if self.tpot_guard:
            queue = self._reject_hopeless_tpot(queue, engine, decision)
        if self.ttft_guard:
            queue = self._reject_unattainable_ttft(now, queue, prefill_backlog(running, engine), engine, decision)
        self._admit(queue, running, engine, decision)
        return decision

    def _reject_unattainable_ttft(
        self, now: float, queue: Sequence[Request], backlog_s: float, engine: EngineState, decision: Decision
    ) -> list[Request]:
        """Walk the queue in deadline order; est. TTFT of entry k = sum over j <= k of t(p_j) (eq. 7)."""
        kept: list[Request] = []
        est, slack, prefill_time = backlog_s, self.slack_s, engine.step_time.prefill
        least_margin = math.inf
        for request in queue:
            prefill = prefill_time(request.prompt_tokens)
            late_by = now + est + prefill + slack - request.deadline_s
            if late_by > 0:
                predicted_s = now - request.arrival_s + est + prefill
                attainable_s = request.ttft_slo_s + late_by
                infeasible = prefill + slack > request.ttft_slo_s
                decision.reject.append(reject_ttft(request, predicted_s, attainable_s, late_by, infeasible))
                continue
            est += prefill
            kept.append(request)
            least_margin = min(least_margin, -late_by)
        if least_margin < math.inf:
            decision.recheck_at = now + least_margin
        return kept

    def _admit(
        self, queue: Sequence[Request], running: Collection[Request], engine: EngineState, decision: Decision
    ) -> None:
        """Admit in order; a request that does not fit now never blocks the one behind it."""
        lookahead = PrefillLookahead.of(running, self.prefill_lookahead_steps * engine.max_num_batched_tokens)
        batch: _Batch | None = None
        for request in queue:
            if not lookahead.fits(request):
                continue
            batch = batch or _Batch.of(running)
            if batch.size and batch.size + request.sequences > engine.max_num_seqs:
                continue
            if self.tpot_guard:
                estimate = self.eta * batch.tpot_with(request, engine.step_time)
                if estimate > batch.strictest_with(request):
                    continue
            decision.admit.append(request)
            batch.add(request)
            lookahead.add(request)

    def _reject_hopeless_tpot(self, queue: Sequence[Request], engine: EngineState, decision: Decision) -> list[Request]:
        """A TPOT bound that even an otherwise idle engine would break is refused at once instead of being queued."""
        kept: list[Request] = []
        itl = engine.step_time.itl
        for request in queue:
            alone = self.eta * itl(request.sequences, request.length + request.predicted_tokens / 2)
            if request.pace_s is None or request.best_effort or alone <= request.pace_s:
                kept.append(request)
            else:
                decision.reject.append(reject_tpot(request, alone, retry_after_s=0.0, infeasible=True))
        return kept


@dataclass(slots=True)
class _Batch:
    """The running set R, kept as the sums that eq. 5 and 8 need, so that a candidate costs O(1).

    With P_min = min over R of P_j,  VBS = sum of TRP_j = P_min * sum of 1/P_j  (requests without a bound run in every
    step and count 1). A best-effort request takes its share of the batch, but its bound protects nobody: P_min is over
    the others.
    """

    size: int = 0
    unbounded: int = 0
    strictest: float = math.inf
    inverse_bounds: float = 0.0
    total_length: float = 0.0

    @classmethod
    def of(cls, running: Collection[Request]) -> _Batch:
        batch = cls()
        for request in running:
            batch.add(request)
        return batch

    def add(self, request: Request) -> None:
        bound = request.pace_s
        self.size += request.sequences
        self.total_length += request.length * request.sequences
        if bound is None:
            self.unbounded += request.sequences
        else:
            self.inverse_bounds += request.sequences / bound
            if not request.best_effort:
                self.strictest = min(self.strictest, bound)

    def strictest_with(self, request: Request) -> float:
        """min over R' of P_j, R' = R + request; infinite when nothing is bounded."""
        bound = request.pace_s
        return self.strictest if bound is None or request.best_effort else min(self.strictest, bound)

    def tpot_with(self, request: Request, step_time: StepTimeModel) -> float:
        """TPOT_est / eta of eq. 5 over R', in its closed form: ITL(VBS, Lmean + y/2)."""
        bound, strictest = request.pace_s, self.strictest_with(request)
        unbounded, inverse = self.unbounded, self.inverse_bounds
        if bound is None:
            unbounded += request.sequences
        else:
            inverse += request.sequences / bound
        size = self.size + request.sequences
        virtual_size = unbounded + strictest * inverse if strictest < math.inf else size
        mean_length = (self.total_length + request.length * request.sequences) / size
        return step_time.itl(virtual_size, mean_length + request.predicted_tokens / 2)
