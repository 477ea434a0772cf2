"""SCORPIO: serving the right requests at the right time for heterogeneous SLOs (section 3 of the paper).

Two guards over one queue. The *TTFT guard* (section 3.3) orders by least deadline first and rejects what its deadline
can no longer meet. The *TPOT guard* (section 3.4) admits a request only if no running request's TPOT bound breaks by
it, with the batch counted at its virtual size; its other half, credit-based batching, runs inside the engine
(`engine_adapter.step_gate.CreditGate`).

Where the authors' code departs from the paper, this follows the paper: a request that does not fit now never blocks the
one behind it, rejection walks the queue in deadline order, and nothing admitted is ever rejected.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass

from engine_adapter.engine import EngineState
from engine_adapter.step_time import StepTimeModel
from gateway.policies.base import Decision, Rejection, prefill_backlog
from gateway.request import E2E_SHARE_FOR_TTFT, Request


@dataclass(slots=True)
class Scorpio:
    """Both guards, each switchable.

    ``eta`` is the paper's inefficiency coefficient (the authors' code: 1.3). ``slack_s`` is kept in hand before a TTFT
    deadline (the authors' code: 50 ms). ``runway_steps`` bounds how many steps' worth of prompt tokens may lie in the
    engine unprefilled: order is kept here, so the engine's own queue stays short.
    """

    eta: float = 1.3
    slack_s: float = 0.05
    ttft_guard: bool = True
    tpot_guard: bool = True
    runway_steps: float = 2.0
    name: str = "scorpio"

    @property
    def gated(self) -> bool:
        """Credit-based batching is part of the TPOT guard."""
        return self.tpot_guard

    def decide(
        self, now: float, waiting: Collection[Request], running: Collection[Request], engine: EngineState
    ) -> Decision:
        """Least deadline first, reject the unattainable, admit what the running batch can bear."""
        decision = Decision()
        order = (lambda r: (r.deadline_s, r.arrival_s)) if self.ttft_guard else (lambda r: (r.arrival_s,))
        queue = sorted(waiting, key=order)
        if self.tpot_guard:
            queue = self._reject_hopeless_tpot(queue, engine, decision)
        if self.ttft_guard:
            queue = self._reject_unattainable_ttft(now, queue, prefill_backlog(running, engine), engine, decision)
        self._admit(now, queue, running, engine, decision)
        return decision

    def _reject_unattainable_ttft(
        self, now: float, queue: list[Request], backlog_s: float, engine: EngineState, decision: Decision
    ) -> list[Request]:
        """Walk the queue in deadline order; est. TTFT of entry k = sum over j <= k of t(p_j) (eq. 7)."""
        kept: list[Request] = []
        est = backlog_s
        for request in queue:
            prefill = engine.step_time.prefill(request.prompt_tokens)
            late_by = now + est + prefill + self.slack_s - request.deadline_s
            if late_by > 0:
                waited = now - request.arrival_s
                from_e2e = request.slo.ttft_s != request.ttft_slo_s
                # An end-to-end bound is answered in its own terms: this TTFT is planned to be a share of it.
                share = E2E_SHARE_FOR_TTFT if from_e2e else 1.0
                decision.reject.append(
                    Rejection(
                        request,
                        bound="e2e" if from_e2e else "ttft",
                        predicted_s=(waited + est + prefill) / share,
                        attainable_s=(request.ttft_slo_s + late_by) / share,
                        retry_after_s=late_by,
                        hopeless=prefill + self.slack_s > request.ttft_slo_s,
                    )
                )
                continue
            est += prefill
            kept.append(request)
            if request.deadline_s < math.inf:
                at = request.deadline_s - est - self.slack_s
                decision.recheck_at = at if decision.recheck_at is None else min(at, decision.recheck_at)
        return kept

    def _admit(
        self,
        now: float,
        queue: list[Request],
        running: Collection[Request],
        engine: EngineState,
        decision: Decision,
    ) -> None:
        batch = _Batch.of(running)
        on_runway = sum(r.prompt_tokens for r in running if r.first_token_s is None)
        runway = self.runway_steps * engine.max_num_batched_tokens
        for request in queue:
            if batch.size + request.sequences > engine.max_num_seqs and batch.size > 0:
                continue
            if on_runway and on_runway + request.prompt_tokens > runway:
                continue
            if self.tpot_guard:
                estimate = self.eta * batch.tpot_with(request, engine.step_time)
                if estimate > batch.strictest_with(request):
                    continue
            decision.admit.append(request)
            batch.add(request)
            on_runway += request.prompt_tokens

    def _reject_hopeless_tpot(self, queue: list[Request], engine: EngineState, decision: Decision) -> list[Request]:
        """A TPOT bound that even an otherwise idle engine would break is refused at once instead of being queued."""
        kept: list[Request] = []
        for request in queue:
            bound = request.tpot_slo_s
            alone = self.eta * _Batch().tpot_with(request, engine.step_time)
            if bound is None or request.best_effort or alone <= bound:
                kept.append(request)
                continue
            from_e2e = bound != request.slo.tpot_s
            # An end-to-end bound is answered in its own terms: y tokens of this TPOT are planned to be a share of it.
            scale = max(1.0, request.predicted_tokens) / (1 - E2E_SHARE_FOR_TTFT) if from_e2e else 1.0
            decision.reject.append(
                Rejection(
                    request,
                    bound="e2e" if from_e2e else "tpot",
                    predicted_s=alone * scale,
                    attainable_s=alone * scale,
                    retry_after_s=0.0,
                    hopeless=True,
                )
            )
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
        bound = request.tpot_slo_s
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
        bound = request.tpot_slo_s
        return self.strictest if bound is None or request.best_effort else min(self.strictest, bound)

    def tpot_with(self, request: Request, step_time: StepTimeModel) -> float:
        """TPOT_est / eta of eq. 5 over R', in its closed form: ITL(VBS, Lmean + y/2)."""
        bound, strictest = request.tpot_slo_s, self.strictest_with(request)
        unbounded, inverse = self.unbounded, self.inverse_bounds
        if bound is None:
            unbounded += request.sequences
        else:
            inverse += request.sequences / bound
        size = self.size + request.sequences
        virtual_size = unbounded + strictest * inverse if strictest < math.inf else size
        mean_length = (self.total_length + request.length * request.sequences) / size
        return step_time.itl(virtual_size, mean_length + request.predicted_tokens / 2)
