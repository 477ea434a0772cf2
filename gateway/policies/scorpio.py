"""SCORPIO's TTFT guard and TPOT guard (arXiv 2505.23022, section 3).

Request i has arrival a_i, TTFT SLO T_i, TPOT SLO P_i, prompt length p_i and predicted output length y_i.

*TTFT guard* (section 3.3). Requests wait in the order of their deadlines d_i = a_i + T_i. Request k is rejected if

    now + est_k + slack_s > d_k,        est_k = sum over j <= k of t(p_j)                       (eq. 7)

with the prefill time t(p) of eq. 6. Admitted prompts that are not prefilled yet count before the first entry.

*TPOT guard* (section 3.4). Request r joins the running set R, which gives R' = R + r, if

    TPOT_est <= min over R' of P_j,
    TPOT_est = eta * mean over k = 1..y_r of ITL(VBS, Lmean + k)  ~  eta * ITL(VBS, Lmean + y_r/2)      (eq. 5)
    VBS      = sum over R' of TRP_j,    TRP_j = P_min / P_j                                             (eq. 8)

with ITL(B, L) of eq. 4, the mean length Lmean of R', and the inefficiency coefficient eta. The other half of this
guard, credit-based batching, runs inside the engine as the `credit` step gate.

The authors' code departs from the paper in three places. This implementation follows the paper:

- A request that does not fit never blocks the next one.
- Rejection walks the queue in deadline order.
- An admitted request is never rejected.
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
    """Applies both guards; each can be switched off.

    Args:
        eta: the inefficiency coefficient (authors' code: 1.3). Tune it per engine.
        slack_s: safety margin before a TTFT deadline, in seconds (authors' code: 50 ms).
        ttft_guard: order by deadline and reject late requests.
        tpot_guard: check eq. 5 at admission and use the `credit` step gate.
        prefill_lookahead_steps: limit on the unprefilled prompt tokens inside the engine, in steps of
            ``max_num_batched_tokens``, beyond those that it plans before a reaction (`EngineState.reaction_steps`). It
            keeps the engine's own queue short, so that this policy's order holds.
    """

    eta: float = 1.3
    slack_s: float = 0.05
    ttft_guard: bool = True
    tpot_guard: bool = True
    prefill_lookahead_steps: float = 2.0
    name: str = "scorpio"

    @property
    def gate(self) -> str:
        """`credit` with the TPOT guard, else none."""
        return "credit" if self.tpot_guard else UNGATED

    def order(self, request: Request) -> tuple[float, ...]:
        """Sort by deadline, or by arrival without the TTFT guard."""
        return (request.deadline_s, request.arrival_s) if self.ttft_guard else (request.arrival_s,)

    def decide(
        self, now: float, waiting: Sequence[Request], running: Collection[Request], engine: EngineState
    ) -> Decision:
        """Reject requests that cannot attain their bounds, then admit the requests that the batch can take."""
        decision = Decision()
        queue: Sequence[Request] = waiting
        if self.tpot_guard:
            queue = self._reject_infeasible_tpot(queue, engine, decision)
        if self.ttft_guard:
            queue = self._reject_late(now, queue, prefill_backlog(running, engine), engine, decision)
        self._admit(queue, running, engine, decision)
        return decision

    def _reject_infeasible_tpot(
        self, queue: Sequence[Request], engine: EngineState, decision: Decision
    ) -> list[Request]:
        """Reject requests whose TPOT bound an idle engine would break: waiting cannot help them."""
        kept: list[Request] = []
        itl = engine.step_time.itl
        for request in queue:
            alone = self.eta * itl(request.sequences, request.length + request.predicted_tokens / 2)
            if request.pace_s is None or request.bounds_waived or alone <= request.pace_s:
                kept.append(request)
            else:
                decision.reject.append(reject_tpot(request, alone, retry_after_s=0.0, infeasible=True))
        return kept

    def _reject_late(
        self, now: float, queue: Sequence[Request], backlog_s: float, engine: EngineState, decision: Decision
    ) -> list[Request]:
        """Reject request k if now + est_k + slack_s > d_k (eq. 7). A rejected request adds nothing to est_k."""
        kept: list[Request] = []
        est, slack, prefill_time = backlog_s, self.slack_s, engine.step_time.prefill
        least_margin = math.inf
        for request in queue:
            prefill = prefill_time(request.uncached_tokens)
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
        """Admit in order each request that fits; skip one that does not."""
        lookahead = PrefillLookahead.of(running, engine, self.prefill_lookahead_steps)
        batch: VirtualBatch | None = None
        for request in queue:
            if not lookahead.fits(request):
                continue
            batch = batch or VirtualBatch.of(running)
            if batch.size and batch.size + request.sequences > engine.max_num_seqs:
                continue
            if self.tpot_guard and self.eta * batch.tpot_with(request, engine.step_time) > batch.p_min_with(request):
                continue
            decision.admit.append(request)
            batch.add(request)
            lookahead.add(request)


@dataclass(slots=True)
class VirtualBatch:
    """The running set R as the sums that eq. 5 and 8 need, so that checking a candidate costs O(1).

    VBS = sum of TRP_j = ``unbounded`` + ``p_min`` * ``inverse_tpot``: a sequence without a TPOT bound decodes in every
    step and counts 1. A best-effort request counts in VBS, but P_min is taken over the other requests only.

    Attributes:
        size: sequences in R.
        unbounded: sequences without a TPOT bound.
        p_min: P_min = min over R of P_j, in seconds per token; infinite without bounds.
        inverse_tpot: sum over R of 1/P_j, in tokens per second.
        total_length: prompt and generated tokens in R.
    """

    size: int = 0
    unbounded: int = 0
    p_min: float = math.inf
    inverse_tpot: float = 0.0
    total_length: float = 0.0

    @classmethod
    def of(cls, running: Collection[Request]) -> VirtualBatch:
        """Return the sums over ``running``."""
        batch = cls()
        for request in running:
            batch.add(request)
        return batch

    def add(self, request: Request) -> None:
        """Add ``request`` to R."""
        tpot = request.pace_s
        self.size += request.sequences
        self.total_length += request.length * request.sequences
        if tpot is None:
            self.unbounded += request.sequences
        else:
            self.inverse_tpot += request.sequences / tpot
            if not request.bounds_waived:
                self.p_min = min(self.p_min, tpot)

    def p_min_with(self, request: Request) -> float:
        """Return min over R' of P_j, with R' = R + request (s per token)."""
        tpot = request.pace_s
        return self.p_min if tpot is None or request.bounds_waived else min(self.p_min, tpot)

    def tpot_with(self, request: Request, step_time: StepTimeModel) -> float:
        """Return TPOT_est / eta over R' = R + request: the closed form of eq. 5, ITL(VBS, Lmean + y/2)."""
        tpot, p_min = request.pace_s, self.p_min_with(request)
        unbounded, inverse_tpot = self.unbounded, self.inverse_tpot
        if tpot is None:
            unbounded += request.sequences
        else:
            inverse_tpot += request.sequences / tpot
        size = self.size + request.sequences
        virtual_size = unbounded + p_min * inverse_tpot if p_min < math.inf else size
        mean_length = (self.total_length + request.length * request.sequences) / size
        return step_time.itl(virtual_size, mean_length + request.predicted_tokens / 2)
