"""`slack`, the default policy: feasibility as arithmetic, and under overload the requests that cost least.

R is the running set, P* = min P_i its strictest pace, T(R) the time of a step in which all of R decode. Prefill gets
the share 1 - T(R)/P* of the time, and a prompt token costs mu seconds.

    1 reject r if its pace is faster than a step with r alone                                      (infeasible)
    2 in deadline order, reject r if now + T(R)/2 + step + mu * (own + queue_discount * ahead) / share > deadline,
      where T(R)/2 is the rest of the step under way, and ahead the backlog and the prompts queued before r  (late)
    3 order the rest by deadline + cost_weight * w, overdue ones and classes below their minimum share first, where
      w = mu * p + (decode + a * mean length) * y is the engine time of a request with p uncached and y output tokens
    4 admit r if slots and KV memory suffice and R + r keeps its strictest pace, T(R + r) <= P*(R + r),
    5   its own prefill ends before its deadline, and the prefill lookahead has tokens left for it
    6 a request that does not fit never blocks the next one
    7 best-effort requests get what is left, in arrival order, and a reserved share of the slots in any case
    8 the slots and memory of best-effort requests beyond that share count as free for all others
    9 with several tenants (`gateway.policies.tenant_shares`), lines 2 to 6 serve those within their share first, as if
      yielding requests were not there, and then the others, whose requests yield

INVARIANT: the running set keeps its strictest pace, and every waiting request can still meet its deadline.

In the engine, `gates.slack` sizes each step, and `gates.best_effort_preemption` frees what line 8 counts on.
"""

from __future__ import annotations

import math
from bisect import bisect
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray

from engine_adapter.engine import EngineState
from engine_adapter.gates.constants import SLACK
from engine_adapter.service_kind import ServiceKind
from gateway.policies.base import MAX_DECISION_INTERVAL_S, Decision, reject_tpot, reject_ttft
from gateway.policies.running_batch import RunningBatch
from gateway.policies.slack.alone import fits_alone
from gateway.policies.slack.batch import WaitingBatch
from gateway.policies.slack.fair_share import FairShare
from gateway.policies.tenant_shares import TenantShares
from gateway.requests.request import Request
from gateway.requests.waiting_arrays import tenant_number
from gateway.requests.waiting_queue import arrays_of, tenant_weights


@dataclass(slots=True)
class _Round:
    """The requests of some tenants in one call of `Slack.decide`: its time, the engine as they see it, its answers."""

    now: float
    batch: RunningBatch
    lookahead_tokens: float
    decision: Decision

    @property
    def lookahead_left(self) -> float:
        """Remaining tokens of the prefill lookahead; infinite without a backlog, so one prompt may always enter."""
        return self.lookahead_tokens - self.batch.backlog if self.batch.backlog else math.inf

    def admit(self, request: Request, pace_s: float) -> None:
        self.batch.add((request,), pace_s)
        self.decision.admit.append(request)
        if request.kind is ServiceKind.PACED and pace_s != request.pace_s:
            self.decision.paces[request.id] = pace_s
        if self.batch.beside_yielding and request.kind is not ServiceKind.BEST_EFFORT:
            self.decision.yielding.add(request.id)


@dataclass(slots=True)
class Slack:
    """The options; each is a number of at least 0.

    Attributes:
        tpot_target_fraction: fraction of a pace to plan with; below 1 keeps a margin for step jitter.
        cost_weight: deadline penalty (s) per second of engine time; 0 orders by deadline alone.
        min_admission_share: classes below this share of the overall admission rate go first; 0: none.
        memory_risk: probability with which the running set may outgrow the KV memory.
        max_wait_s: wait (s) after which a request is overdue and goes first; a best-effort one for reserved slots only.
        queue_discount: fraction of the work queued ahead that counts in line 2, since some of it will be rejected.
        prefill_lookahead_steps: steps' worth of prefill that may wait inside the engine.
    """

    tpot_target_fraction: float = 1.0
    cost_weight: float = 150.0
    min_admission_share: float = 0.5
    memory_risk: float = 0.01
    max_wait_s: float = 60.0
    queue_discount: float = 0.5
    prefill_lookahead_steps: float = 2.0
    name: str = "slack"
    gate: str = "slack"
    _memory_z: float = field(init=False, repr=False, compare=False)
    _fair_share: FairShare = field(init=False, repr=False, compare=False)
    _tenants: TenantShares = field(init=False, repr=False, compare=False, default_factory=TenantShares)

    def __post_init__(self) -> None:
        if not 0 < self.tpot_target_fraction <= 1:
            raise ValueError(f"tpot_target_fraction must be above 0 and at most 1, not {self.tpot_target_fraction!r}")
        if not 0 < self.memory_risk < 1:
            raise ValueError(f"memory_risk must be between 0 and 1, but it is {self.memory_risk!r}")
        self._memory_z = NormalDist().inv_cdf(1 - self.memory_risk)
        self._fair_share = FairShare(self.min_admission_share)

    def order(self, request: Request) -> tuple[float, ...]:
        """Earliest deadline first; best-effort requests last, in arrival order."""
        if request.kind is ServiceKind.BEST_EFFORT:
            return (math.inf, request.arrival_s)
        return (min(request.deadline_s, request.arrival_s + self.max_wait_s), request.arrival_s)

    def decide(
        self, now: float, waiting: Sequence[Request], running: Collection[Request], engine: EngineState
    ) -> Decision:
        """Apply the lines of the module's docstring, in their order."""
        if not waiting:
            return Decision()
        batch, decision = RunningBatch.of(running, engine, self._memory_z), Decision()
        this = _Round(now, batch, self.prefill_lookahead_steps * batch.chunk_tokens, decision)
        if len(waiting) > 1 or not self._admit_alone(this, waiting[0], running):
            self._serve_all(this, waiting, running)
        self._fair_share.note(decision)
        self._tenants.note(now, decision.admit, batch.prefill_token_s)
        decision.hold_s = min(batch.step_s, MAX_DECISION_INTERVAL_S)
        decision.max_hold_s = min(SLACK.max_hold_s, self.prefill_lookahead_steps * batch.strictest_s)
        return decision

    def _serve_all(self, this: _Round, waiting: Sequence[Request], running: Collection[Request]) -> None:
        """Lines 1 to 9."""
        now, batch = this.now, this.batch
        count = bisect(waiting, False, key=lambda request: request.kind is ServiceKind.BEST_EFFORT)
        arrays, best_effort = arrays_of(waiting, count), waiting[count:]
        queue = WaitingBatch.of(waiting[:count], arrays, batch, now, self.tpot_target_fraction)
        queue = self._reject_infeasible(this, queue)
        overdue = [r for r in best_effort if now - r.arrival_s > self.max_wait_s]
        waits, weights = False, tenant_weights(waiting)
        if queue.requests and self._tenants.several(now, weights):
            above, others_share = self._tenants.above(now, weights, running, batch)
            over = np.isin(queue.arrays.tenant, [tenant_number(name) for name in above])
            waits = self._serve(this, queue.only(~over), ())
            this, queue = self._beside_yielding(this, running, others_share / batch.prefill_share), queue.only(over)
        waits |= self._serve(this, queue, overdue)
        self._admit_best_effort(this, best_effort, batch.reserved_slots if waits else batch.engine.max_num_seqs)

    def _admit_alone(self, this: _Round, request: Request, running: Collection[Request]) -> bool:
        """Admit the only waiting request if it surely fits and does not yield."""
        bound_s = request.pace_s if request.kind is ServiceKind.PACED else None
        pace_s = math.inf if bound_s is None else self.tpot_target_fraction * bound_s
        if not fits_alone(request, pace_s, this.batch, this.now):
            return False
        weights = {request.tenant: request.weight}
        if request.kind is not ServiceKind.BEST_EFFORT and self._tenants.several(this.now, weights):
            above, _ = self._tenants.above(this.now, weights, running, this.batch)
            if request.tenant in above:
                return False
        this.admit(request, pace_s)
        return True

    def _beside_yielding(self, this: _Round, running: Collection[Request], kept_free: float) -> _Round:
        """Line 9: go on with the tenants above their share. The others' prompts take ``kept_free`` of the time."""
        batch = RunningBatch.of(running, this.batch.engine, self._memory_z, beside_yielding=True, kept_free=kept_free)
        for request in this.decision.admit:
            batch.add((request,), this.decision.paces.get(request.id, request.pace_s))
        return _Round(this.now, batch, self.prefill_lookahead_steps * batch.chunk_tokens, this.decision)

    def _serve(self, this: _Round, queue: WaitingBatch, overdue: Sequence[Request]) -> bool:
        """Lines 2 to 6, and the ``overdue`` best-effort requests. Return whether any of ``queue`` is left waiting."""
        queue = self._reject_late(this, queue)
        self._admit_best_effort(this, overdue, this.batch.reserved_slots, overdue=True)
        return self._admit(this, queue)

    def _reject_infeasible(self, this: _Round, queue: WaitingBatch) -> WaitingBatch:
        """Line 1."""
        alone_s = queue.alone_s(this.batch.engine)
        infeasible, tokens = alone_s > queue.pace_s, this.batch.engine.tokens_per_step
        for at in np.flatnonzero(infeasible).tolist():
            request, attainable_s = queue.requests[at], float(alone_s[at]) / (self.tpot_target_fraction * tokens)
            # An end-to-end bound E may have been feasible at arrival, with the pace E / y.
            never = attainable_s > (request.slo.e2e_s or 0.0) / max(request.predicted_tokens, 1.0)
            this.decision.reject.append(reject_tpot(request, attainable_s, 0.0, infeasible=never))
        return queue.only(~infeasible) if infeasible.any() else queue

    def _reject_late(self, this: _Round, queue: WaitingBatch) -> WaitingBatch:
        """Line 2."""
        batch, curve = this.batch, this.batch.engine.step_time.curve
        stretch = 1 / batch.prefill_share
        ahead_stretch = self.queue_discount * stretch
        # The step under way must end, and the one that brings the first token takes what any step takes.
        step_s = max(batch.step_s, curve.step_s(1, 0))
        fixed_s = this.now + batch.step_s / 2 + step_s + curve.h
        ahead_s, own_s = batch.prefill_token_s * batch.backlog, batch.prefill_token_s * queue.arrays.uncached
        first_s = fixed_s + ahead_stretch * (ahead_s + np.cumsum(own_s) - own_s) + stretch * own_s
        late = first_s > queue.arrays.deadline
        if not late.any():
            return queue
        idle_s = curve.step_s(1, 0) + curve.h
        idle_token_s = curve.prefill_token_s(0.0, batch.engine.max_num_batched_tokens, math.inf)
        # A rejected request is not ahead of the next one, so they are checked in turn.
        for at, (request, prefill_s) in enumerate(zip(queue.requests, own_s.tolist(), strict=True)):
            late_s = fixed_s + ahead_stretch * ahead_s + stretch * prefill_s - request.deadline_s
            late[at] = late_s > 0
            if late_s <= 0:
                ahead_s += prefill_s
                continue
            predicted_s = request.ttft_slo_s + late_s
            # A second try is promised without discount, and with a step in reserve.
            attainable_s = predicted_s + (stretch - ahead_stretch) * ahead_s + step_s
            infeasible = idle_s + idle_token_s * request.uncached_tokens > request.ttft_slo_s
            this.decision.reject.append(reject_ttft(request, predicted_s, attainable_s, late_s, infeasible))
        return queue.only(~late)

    def _admit(self, this: _Round, queue: WaitingBatch) -> bool:
        """Lines 3 to 6. Return whether any request is left waiting."""
        batch, left = this.batch, len(queue.requests)
        if not left or batch.free_slots <= 0:
            return left > 0
        order = self._order(this, queue)
        while len(order) and batch.free_slots > 0:
            # Most candidates pass, so test them one at a time and re-filter only after a failure.
            first, order = order[:1], order[1:]
            if batch.slots and not queue.fit(batch, this.now, first)[0]:
                order = order[queue.fit(batch, this.now, order)]
                continue
            at = int(first[0])
            tpot_s = queue.requests[at].slo.tpot_s
            most_s = math.inf if tpot_s is None else self.tpot_target_fraction * tpot_s
            pace_s = float(queue.pace_s[at]) / batch.engine.tokens_per_step
            this.admit(queue.requests[at], min(SLACK.e2e_pace_factor * pace_s, most_s))
            order = order[queue.arrays.uncached[order] <= this.lookahead_left]
            left -= 1
        return left > 0

    def _order(self, this: _Round, queue: WaitingBatch) -> NDArray[np.intp]:
        """Line 3, of the requests whose prompts the lookahead has tokens for.

        NOTE: the first request with a claim (it is overdue, or its class is behind) leads and may exceed the lookahead.
        Otherwise shorter prompts could always overtake it.
        """
        due_s = np.minimum(queue.arrays.deadline, queue.arrays.arrival + self.max_wait_s)
        claims, behind = due_s < this.now, self._fair_share.behind(queue.requests)
        if behind:
            claims |= np.array(behind)
        key = due_s + self.cost_weight * queue.cost_s(this.batch)
        enters = queue.arrays.uncached <= this.lookahead_left
        if this.lookahead_left >= 0 and claims.any():
            enters[np.argmin(np.where(claims, key, math.inf))] = True
        order = np.flatnonzero(enters)
        ranks: NDArray[np.intp] = np.lexsort((key[order], ~claims[order]))
        return order[ranks]

    def _admit_best_effort(self, this: _Round, requests: Sequence[Request], slots: int, overdue: bool = False) -> None:
        """Line 7: in arrival order, up to ``slots`` best-effort slots. An overdue prompt may exceed the lookahead."""
        batch, blocks, most = this.batch, this.batch.best_effort_slots > 0, this.batch.engine.max_num_seqs
        for request in [r for r in requests[:most] if r not in this.decision.admit]:
            full = batch.best_effort_slots and batch.best_effort_slots + request.sequences > slots
            if full or batch.slots >= most or this.lookahead_left < (0 if overdue else request.uncached_tokens):
                break
            if not batch.slots or batch.has_capacity_for(request):
                this.admit(request, math.inf)
            elif blocks:
                break  # It may fit once the running best-effort requests have ended.
