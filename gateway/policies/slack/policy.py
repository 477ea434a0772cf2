"""`slack`, the default policy: feasibility as arithmetic, and under overload the requests that cost least.

R is the running set, P* = min P_i its strictest pace, T(R) the time of a step in which all of R decode. Prefill gets
the share 1 - T(R)/P* of the time, and a prompt token costs mu seconds: prefill(n) = mu * n / share. While R is ahead of
its paces, prompts take full steps, which is faster (`RunningBatch.full_steps`).

    1 reject r if its pace is faster than a step with r alone                                      (infeasible)
    2 in deadline order, reject r if now + T(R)/2 + step + prefill(own + queue_discount * ahead) > deadline       (late)
    3 order the rest by deadline + cost_weight * (engine seconds of r); overdue ones and rarely admitted classes lead
    4 admit r if slots and KV memory suffice and R + r keeps its strictest pace, T(R + r) <= P*(R + r),
    5   its own prefill ends before its deadline, and the prefill lookahead has tokens left for it
    6 a request that does not fit never blocks the next one
    7 best-effort requests get what is left, in arrival order, and a reserved share of the slots in any case
    8 the slots and memory of best-effort requests beyond that share count as free for all others
    9 tenants within their share (`tenant_shares`) go through 2 to 6 first, as if yielding ones, all others, sat out

INVARIANT: the running set keeps its strictest pace, and every waiting request can still meet its deadline.
In the engine, `gates.slack` sizes each step, and `gates.best_effort_preemption` frees what line 8 counts on.
"""

from __future__ import annotations

import math
from bisect import bisect
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from engine_adapter.engine import EngineState
from engine_adapter.gates.best_effort_preemption import reserved_slots
from engine_adapter.gates.constants import SLACK
from engine_adapter.service_kind import ServiceKind
from gateway.policies.base import MAX_DECISION_INTERVAL_S, Decision, PrefillLookahead, reject_tpot, reject_ttft
from gateway.policies.running_batch import RunningBatch
from gateway.policies.slack.batch import WaitingBatch, fits_alone, surely_fits
from gateway.policies.tenant_shares import TenantShares
from gateway.requests.request import Request
from gateway.requests.waiting_arrays import tenant_number
from gateway.requests.waiting_queue import arrays_of, tenant_weights

# Looking a member up in its class costs more than comparing it.
_PACED, _BEST_EFFORT = ServiceKind.PACED, ServiceKind.BEST_EFFORT


@dataclass(slots=True)
class ClassShares:
    """The admitted share of the latest `fair_share_window` decided requests of each SLO class, on one engine."""

    _classes: dict[str | None, tuple[float, int]] = field(default_factory=dict)
    """Class (None: all) to (admitted share, decided requests). The share is a moving average."""

    def note(self, decision: Decision) -> None:
        """Count the decided requests, but no best-effort or infeasible ones. A waived one counts as rejected."""
        decided = [(request, 1.0) for request in decision.admit if request.kind is not _BEST_EFFORT]
        decided += [(rejection.request, 0.0) for rejection in decision.reject if not rejection.infeasible]
        for request, admitted in decided:
            for name in (request.slo_class, None):
                share, count = self._classes.get(name, (1.0, 0))
                count = min(count + 1, SLACK.fair_share_window)
                self._classes[name] = (share + (admitted - share) / count, count)

    def behind(self, requests: Sequence[Request], min_share: float) -> NDArray[np.bool_]:
        """Return which requests are of a class whose share is below ``min_share`` times the share of all."""
        least = min_share * self._classes.get(None, (1.0, 0))[0]
        behind = {name for name, (share, _) in self._classes.items() if share < least}
        return np.array([r.slo_class in behind for r in requests]) if behind else np.zeros(len(requests), np.bool_)


@dataclass(slots=True)
class _Round:
    """The requests of some tenants in one call of `Slack.decide`: its time, the engine as they see it, its answers."""

    now: float
    batch: RunningBatch
    lookahead: PrefillLookahead
    decision: Decision

    def admit(self, request: Request, needed_s: float = math.inf) -> None:
        """Admit ``request``. ``needed_s``: the pace that an end-to-end bound needs now; it is relaxed."""
        pace_s, tpot_s = request.pace_s, request.slo.tpot_s
        if request.slo.e2e_s is not None and request.kind is _PACED:
            pace_s = min(SLACK.e2e_pace_factor * needed_s, math.inf if tpot_s is None else tpot_s)
            self.decision.paces[request.id] = pace_s
        self.batch.add((request,), pace_s)
        self.lookahead.add(request)
        self.decision.admit.append(request)
        if self.batch.beside_yielding and request.kind is not _BEST_EFFORT:
            self.decision.yielding.add(request.id)


@dataclass(slots=True)
class Slack:
    """The options; each is a number of at least 0.

    Attributes:
        cost_weight: deadline penalty (s) per second of engine time; 0 orders by deadline alone.
        min_admission_share: classes below this share of the overall admission rate go first; 0: none.
        max_wait_s: wait (s) after which a request is overdue and goes first; a best-effort one for reserved slots only.
        queue_discount: fraction of the work queued ahead that counts in line 2, since some of it will be rejected.
        prefill_lookahead_steps: steps' worth of prefill that may wait inside the engine, beyond the steps that it plans
            before a reaction (`EngineState.reaction_steps`).
    """

    cost_weight: float = 150.0
    min_admission_share: float = 0.5
    max_wait_s: float = 60.0
    queue_discount: float = 0.5
    prefill_lookahead_steps: float = 2.0
    name: str = "slack"
    gate: str = "slack"
    _classes: ClassShares = field(init=False, repr=False, compare=False, default_factory=ClassShares)
    _tenants: TenantShares = field(init=False, repr=False, compare=False, default_factory=TenantShares)

    def order(self, request: Request) -> tuple[float, ...]:
        """Earliest deadline first; best-effort requests last, in arrival order."""
        if request.kind is _BEST_EFFORT:
            return (math.inf, request.arrival_s)
        return (min(request.deadline_s, request.arrival_s + self.max_wait_s), request.arrival_s)

    def decide(
        self, now: float, waiting: Sequence[Request], running: Collection[Request], engine: EngineState
    ) -> Decision:
        """Apply the lines of the module's docstring, in their order."""
        if not waiting:
            return Decision()
        batch, decision = RunningBatch(running, engine, now=now), Decision()
        this = _Round(now, batch, batch.lookahead(self.prefill_lookahead_steps), decision)
        if len(waiting) > 1 or not self._admit_alone(this, waiting[0], running):
            self._serve_all(this, waiting, running)
        self._classes.note(decision)
        self._tenants.note(now, decision.admit, batch.prefill_token_s)
        decision.hold_s = min(batch.step_s, MAX_DECISION_INTERVAL_S)
        decision.max_hold_s = min(SLACK.max_hold_s, self.prefill_lookahead_steps * batch.strictest_s)
        return decision

    def _admit_alone(self, this: _Round, request: Request, running: Collection[Request]) -> bool:
        """Admit the only waiting request if it surely fits and does not yield."""
        if not this.lookahead.fits(request) or not fits_alone(request, this.batch, this.now):
            return False
        if request.kind is not _BEST_EFFORT:
            above, _ = self._tenants.above(this.now, {request.tenant: request.weight}, running, this.batch)
            if request.tenant in above:
                return False
        this.admit(request)
        return True

    def _serve_all(self, this: _Round, waiting: Sequence[Request], running: Collection[Request]) -> None:
        """Lines 1 to 9."""
        now, batch, waits = this.now, this.batch, False
        count = bisect(waiting, False, key=lambda request: request.kind is _BEST_EFFORT)
        best_effort, reserved = waiting[count:], reserved_slots(batch.engine.max_num_seqs)
        queue = self._reject_infeasible(this, WaitingBatch.of(waiting[:count], arrays_of(waiting, count), now))
        above, others_share = self._tenants.above(now, tenant_weights(waiting), running, batch)
        self._admit_best_effort(this, [r for r in best_effort if now - r.arrival_s > self.max_wait_s], reserved, True)
        if above and queue.requests:
            over = np.isin(queue.arrays.tenant, [tenant_number(name) for name in above])
            waits = self._admit(this, self._reject_late(this, queue.only(~over)))
            # The others get what is left: the prompts of those within their share take ``others_share`` of the time.
            beside = RunningBatch(running, batch.engine, True, others_share / batch.prefill_share, now)
            for request in this.decision.admit:
                beside.add((request,), this.decision.paces.get(request.id))
            this = _Round(now, beside, beside.lookahead(self.prefill_lookahead_steps), this.decision)
            queue = queue.only(over)
        waits |= self._admit(this, self._reject_late(this, queue))
        self._admit_best_effort(this, best_effort, reserved if waits else batch.engine.max_num_seqs)

    def _reject_infeasible(self, this: _Round, queue: WaitingBatch) -> WaitingBatch:
        """Line 1."""
        of, curve = queue.arrays, this.batch.engine.step_time.curve
        alone_s = curve.steps_s(of.sequences, (of.prompt + of.output / 2) * of.sequences)
        alone_s /= this.batch.engine.tokens_per_step
        infeasible = alone_s > queue.pace_s
        for at in np.flatnonzero(infeasible).tolist():
            request, attainable_s = queue.requests[at], float(alone_s[at])
            # An end-to-end bound E may have been feasible at arrival, with the pace E / y.
            never = attainable_s > (request.slo.e2e_s or 0.0) / max(request.predicted_tokens, 1.0)
            this.decision.reject.append(reject_tpot(request, attainable_s, 0.0, infeasible=never))
        return queue.only(~infeasible) if infeasible.any() else queue

    def _reject_late(self, this: _Round, queue: WaitingBatch) -> WaitingBatch:
        """Line 2."""
        batch, curve, discount = this.batch, this.batch.engine.step_time.curve, self.queue_discount
        token_s, idle_s = batch.prefill_token_s / batch.prefill_share, curve.step_s(1, 0) + curve.h
        # The step under way must end, and the one that brings the first token takes what any step takes.
        step_s = max(batch.step_s, curve.step_s(1, 0))
        fixed_s = this.now + batch.step_s / 2 + step_s + curve.h
        own, (in_full_steps, full_token_s) = queue.arrays.uncached, batch.full_steps
        work = discount * (batch.backlog + np.cumsum(own) - own) + own
        full = np.minimum(work, in_full_steps)
        late = fixed_s + full * full_token_s + (work - full) * token_s > queue.arrays.deadline
        if not late.any():
            return queue
        idle_token_s = curve.prefill_token_s(0.0, batch.engine.max_num_batched_tokens, math.inf)
        # A rejected request is not ahead of the next one, so they are checked in turn.
        ahead = float(batch.backlog)
        for at, (request, tokens) in enumerate(zip(queue.requests, own.tolist(), strict=True)):
            needed = discount * ahead + tokens
            full_tokens = min(needed, in_full_steps)
            late_s = fixed_s + full_tokens * full_token_s + (needed - full_tokens) * token_s - request.deadline_s
            late[at] = late_s > 0
            if late_s <= 0:
                ahead += tokens
                continue
            predicted_s = request.ttft_slo_s + late_s
            # A second try is promised without discount, and with a step in reserve.
            attainable_s = predicted_s + (1 - discount) * ahead * token_s + step_s
            infeasible = idle_s + idle_token_s * request.uncached_tokens > request.ttft_slo_s
            this.decision.reject.append(reject_ttft(request, predicted_s, attainable_s, late_s, infeasible))
        return queue.only(~late)

    def _admit(self, this: _Round, queue: WaitingBatch) -> bool:
        """Lines 3 to 6. Return whether any request is left waiting."""
        batch, left = this.batch, len(queue.requests)
        if not left or batch.free_slots <= 0:
            return left > 0
        order, tokens = self._order(this, queue), float(queue.arrays.uncached.sum())
        while len(order) and batch.free_slots > 0:
            # Most candidates pass, so test them one at a time and re-filter only after a failure.
            first, order = order[:1], order[1:]
            request, pace_s = queue.requests[int(first[0])], float(queue.pace_s[first[0]])
            fits = not batch.slots or surely_fits(request, pace_s, batch, this.now, tokens)
            if not fits and not queue.fit(batch, this.now, first)[0]:
                order = order[queue.fit(batch, this.now, order)]
                continue
            this.admit(request, pace_s)
            order = order[queue.arrays.uncached[order] <= this.lookahead.left]
            left -= 1
        return left > 0

    def _order(self, this: _Round, queue: WaitingBatch) -> NDArray[np.intp]:
        """Line 3, of the requests whose prompts the lookahead has tokens for.

        NOTE: the first one with a claim may exceed it. Otherwise shorter prompts could always overtake that one.
        """
        due_s = np.minimum(queue.arrays.deadline, queue.arrays.arrival + self.max_wait_s)
        claims = (due_s < this.now) | self._classes.behind(queue.requests, self.min_admission_share)
        key = due_s + self.cost_weight * queue.cost_s(this.batch)
        enters = queue.arrays.uncached <= this.lookahead.left
        if this.lookahead.left >= 0 and claims.any():
            enters[np.argmin(np.where(claims, key, math.inf))] = True
        order = np.flatnonzero(enters)
        return np.asarray(order[np.lexsort((key[order], ~claims[order]))], dtype=np.intp)

    def _admit_best_effort(self, this: _Round, requests: Sequence[Request], slots: int, overdue: bool = False) -> None:
        """Line 7: in arrival order, up to ``slots`` best-effort slots. An overdue prompt may exceed the lookahead."""
        batch, blocks, most = this.batch, this.batch.best_effort_slots > 0, this.batch.engine.max_num_seqs
        for request in [r for r in requests[:most] if r not in this.decision.admit]:
            full = batch.best_effort_slots and batch.best_effort_slots + request.sequences > slots
            if full or batch.slots >= most or this.lookahead.left < (0 if overdue else request.uncached_tokens):
                break
            if not batch.slots or batch.has_room_for(request):
                this.admit(request)
            elif blocks:
                break  # It may fit once the running best-effort requests have ended.
