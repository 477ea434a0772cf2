"""`slack`, the default policy: feasibility as arithmetic, and under overload the requests that cost least.

With the running set R, its strictest pace P* = min P_i, the time T(R) of a step in which all of R decode, the share of
time that is left for prefill, 1 - T(R)/P*, and the cost mu of an uncached prompt token:

    1 reject r if its pace is faster than a step with r alone                                      (infeasible)
    2 in deadline order, reject r if now + step + mu * (backlog + ahead + own) / share > deadline  (late)
    3 order the rest by deadline + cost_weight * w, classes and tenants under their minimum share first, where
      w = mu * p + (decode + a * mean length) * y is the engine time of a request with p prompt and y output tokens
    4 admit r if slots and KV memory suffice and R + r keeps its strictest pace, T(R + r) <= P*(R + r),
    5   its own prefill ends before its deadline, and the prefill lookahead has room
    6 a request that does not fit never blocks the next one
    7 best-effort requests get what is left, in arrival order, and a small share of the slots in any case
    8 the slots and memory of best-effort requests beyond that share count as free for all others

INVARIANT: the running set keeps its strictest pace, and every waiting request can still meet its deadline.

Inside the engine, `engine_adapter.gates.slack` sizes each step and `best_effort_preemption` frees what line 8 counts on.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from functools import partial

import numpy as np
from numpy.typing import NDArray

from engine_adapter.engine import EngineState
from engine_adapter.gates.best_effort_preemption import RecentPeak, reserved_slots
from engine_adapter.gates.constants import SLACK
from engine_adapter.service_kind import ServiceKind
from gateway.policies.base import MAX_DECISION_INTERVAL_S, Decision, PrefillLookahead, reject_tpot, reject_ttft
from gateway.policies.slack.batch import RunningBatch, WaitingBatch, normal_quantile
from gateway.policies.slack.fair_share import FairShare
from gateway.requests.request import Request
from gateway.requests.waiting_queue import arrays_of


@dataclass(slots=True)
class Slack:
    """The options; each is a number of at least 0.

    Attributes:
        tpot_target_fraction: the fraction of a pace to plan with. Below 1 it keeps a margin for step jitter.
        cost_weight: deadline penalty (s) per second of engine time; 0 orders by deadline alone.
        min_admission_share: the share of the overall admission rate that each class and tenant gets; 0 turns it off.
        memory_risk: the probability with which the running set may outgrow the KV memory.
        max_wait_s: a paced request without a TTFT bound is due so long after it arrived; a best-effort one then gets
            its share of slots first.
        queue_discount: the fraction of the work queued ahead that counts in line 2, since some of it is rejected.
        prefill_lookahead_steps: steps' worth of prefill that may wait inside the engine: the step under way and the next.
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
    _fair_share: FairShare = field(init=False, repr=False, compare=False)
    _peak: RecentPeak = field(default_factory=RecentPeak, init=False, repr=False, compare=False)
    _memory_z: float = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if not 0 < self.tpot_target_fraction <= 1:
            raise ValueError(
                f"tpot_target_fraction must be above 0 and at most 1, but it is {self.tpot_target_fraction!r}"
            )
        if not 0 < self.memory_risk < 1:
            raise ValueError(f"memory_risk must be between 0 and 1, but it is {self.memory_risk!r}")
        self._memory_z = normal_quantile(self.memory_risk)
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
        decision = Decision()
        if not waiting:
            return decision
        batch = RunningBatch.of(running, engine)
        lookahead = PrefillLookahead.of(running, self.prefill_lookahead_steps * batch.chunk_tokens)
        count = int(np.count_nonzero(arrays_of(waiting).kind != ServiceKind.BEST_EFFORT))
        queue = WaitingBatch.of(
            waiting[:count],
            arrays_of(waiting, count),
            batch,
            now=now,
            backlog=lookahead.tokens,
            max_wait_s=self.max_wait_s,
            tpot_target_fraction=self.tpot_target_fraction,
        )
        queue = self._reject_infeasible(queue, engine, decision)
        queue = self._reject_late(now, queue, batch, lookahead, decision)
        best_effort, reserved = list(waiting[count:]), reserved_slots(engine.max_num_seqs)
        overdue = [r for r in best_effort if now - r.arrival_s > self.max_wait_s]
        self._admit_best_effort(overdue, reserved, batch, lookahead, decision, overdue=True)
        held_back = self._admit(now, queue, batch, lookahead, decision)
        self._admit_best_effort(
            [r for r in best_effort if r not in decision.admit] if decision.admit else best_effort,
            self._slots_for_best_effort(now, batch, reserved, held_back),
            batch,
            lookahead,
            decision,
        )
        self._fair_share.note(decision)
        decision.fits = partial(self._fits, batch=batch, lookahead=lookahead)
        decision.hold_s = min(self._hold_s(batch, lookahead), MAX_DECISION_INTERVAL_S)
        decision.max_hold_s = min(self.prefill_lookahead_steps * batch.strictest_s, SLACK.max_hold_s)
        return decision

    def _reject_infeasible(self, queue: WaitingBatch, engine: EngineState, decision: Decision) -> WaitingBatch:
        """Line 1."""
        alone_s = queue.alone_s(engine)
        infeasible = alone_s > queue.pace_s
        for at in np.flatnonzero(infeasible).tolist():
            request, attainable_s = queue.requests[at], float(alone_s[at]) / self.tpot_target_fraction
            if request.pace_s is not None and attainable_s <= request.pace_s:
                # Its end-to-end bound was feasible at arrival and is not any more: line 2 rejects it as late.
                infeasible[at] = False
            else:
                decision.reject.append(reject_tpot(request, attainable_s, 0.0, infeasible=True))
        return queue.only(~infeasible) if infeasible.any() else queue

    def _reject_late(
        self, now: float, queue: WaitingBatch, batch: RunningBatch, lookahead: PrefillLookahead, decision: Decision
    ) -> WaitingBatch:
        """Line 2. Sets when to check again: when the next deadline becomes unattainable."""
        curve = batch.engine.step_time.curve
        stretch = 1 / batch.prefill_share
        ahead_stretch = self.queue_discount * stretch
        # The step under way must end, and the one that brings the first token takes what any step takes.
        step_s = max(batch.step_s, curve.step_s(1, 0))
        fixed_s = now + batch.step_s / 2 + step_s + curve.h
        ahead_s = batch.prefill_token_s * lookahead.tokens
        deadline, own_s = queue.arrays.deadline, queue.prefill_s
        queued_s = np.cumsum(own_s) - own_s
        margin_s = deadline - (fixed_s + ahead_stretch * (ahead_s + queued_s) + stretch * own_s)
        late = margin_s < 0
        if late.any():
            # A rejected request is not ahead of the next one, so from the first one on they are checked in turn.
            first = int(np.argmax(late))
            ahead_s += float(queued_s[first])
            for at, (due_s, prefill_s) in enumerate(
                zip(deadline[first:].tolist(), own_s[first:].tolist(), strict=True), first
            ):
                late_s = fixed_s + ahead_stretch * ahead_s + stretch * prefill_s - due_s
                margin_s[at] = -late_s
                if late_s <= 0:
                    ahead_s += prefill_s
                    continue
                request = queue.requests[at]
                predicted_s = request.ttft_slo_s + late_s
                # What is promised for a second try has no discount, and a step in reserve.
                attainable_s = predicted_s + (stretch - ahead_stretch) * ahead_s + step_s
                infeasible = curve.step_s(0, 0, request.prompt_tokens) > request.ttft_slo_s
                decision.reject.append(reject_ttft(request, predicted_s, attainable_s, late_s, infeasible))
            late = margin_s < 0
            queue, margin_s = queue.only(~late), margin_s[~late]
        least_s = float(margin_s.min(initial=math.inf))
        decision.recheck_at = now + least_s if least_s < math.inf else None
        return queue

    def _admit(
        self, now: float, queue: WaitingBatch, batch: RunningBatch, lookahead: PrefillLookahead, decision: Decision
    ) -> bool:
        """Lines 3 to 6. Return whether any request is left waiting."""
        most, before = batch.engine.max_num_seqs, len(decision.admit)
        if not queue.requests or batch.slots_in_use >= most:
            return bool(queue.requests)
        order, claim = self._order(now, queue, batch)
        fit = partial(queue.fit, now=now, memory_z=self._memory_z)
        while len(order) and batch.slots_in_use < most:
            # Most candidates pass, so test them one at a time and re-filter only after a failure.
            at, order = int(order[0]), order[1:]
            request = queue.requests[at]
            roomy = lookahead.fits(request) or (at == claim and lookahead.tokens <= lookahead.limit)
            if batch.slots and not (roomy and fit(batch, backlog=lookahead.tokens, at=np.array([at]))[0]):
                room = lookahead.limit - lookahead.tokens if lookahead.tokens else math.inf
                order = order[queue.arrays.prompt[order] <= room]
                order = order[fit(batch, backlog=lookahead.tokens, at=order)]
                continue
            self._take(request, float(queue.planned_pace_s[at]), batch, lookahead, decision)
        return len(decision.admit) - before < len(queue.requests)

    def _order(self, now: float, queue: WaitingBatch, batch: RunningBatch) -> tuple[NDArray[np.intp], int | None]:
        """Line 3. Return all requests in order, and the first if it has a claim: it is overdue, or its group is behind.

        A claim also enters a lookahead that has room for a shorter prompt only; else short ones could pass it for ever.
        """
        key = queue.due_s + self.cost_weight * queue.cost_s(batch, np.arange(len(queue.requests)))
        claims = queue.due_s < now
        behind = self._fair_share.behind(queue.requests)
        if behind is not None:
            claims |= np.array(behind, dtype=bool)
        order = np.lexsort((key, ~claims))
        return order, int(order[0]) if claims[order[0]] else None

    def _take(
        self, request: Request, pace_s: float, batch: RunningBatch, lookahead: PrefillLookahead, decision: Decision
    ) -> None:
        batch.add((request,), (pace_s,))
        lookahead.add(request)
        decision.admit.append(request)
        if request.kind is ServiceKind.PACED and pace_s != request.pace_s:
            decision.paces[request.id] = pace_s

    def _admit_best_effort(
        self,
        requests: Sequence[Request],
        slots: int,
        batch: RunningBatch,
        lookahead: PrefillLookahead,
        decision: Decision,
        overdue: bool = False,
    ) -> None:
        """Line 7: in arrival order, up to ``slots`` best-effort slots. Overdue requests ignore the lookahead.

        One that does not fit blocks those behind it only while other best-effort requests run: when they end, it may.
        """
        engine, blocks = batch.engine, batch.best_effort_slots > 0
        for request in requests:
            if batch.best_effort_slots and batch.best_effort_slots + request.sequences > slots:
                break
            if batch.slots >= engine.max_num_seqs or not (overdue or lookahead.fits(request)):
                break
            if batch.slots and not self._has_room(request, batch):
                if blocks:
                    break
                continue
            self._take(request, math.inf, batch, lookahead, decision)

    def _has_room(self, request: Request, batch: RunningBatch) -> bool:
        """Whether slots and memory suffice without preempting anything."""
        engine = batch.engine
        memory = batch.memory + (request.prompt_tokens + max(request.predicted_tokens, 1.0)) * request.sequences
        deviation = math.sqrt(batch.variance + request.variance)
        return batch.slots + request.sequences <= engine.max_num_seqs and (
            engine.kv_tokens <= 0 or memory + self._memory_z * deviation <= engine.kv_tokens
        )

    def _slots_for_best_effort(self, now: float, batch: RunningBatch, reserved: int, held_back: bool) -> int:
        """The reserved slots; and if no other request waits, all that the others did not use recently."""
        others = batch.slots - batch.best_effort_slots
        peak = int(self._peak.note(now, others))
        if held_back:
            return reserved
        return max(reserved, batch.engine.max_num_seqs - peak) if others else batch.engine.max_num_seqs

    def _fits(self, request: Request, batch: RunningBatch, lookahead: PrefillLookahead) -> bool:
        """Whether an arriving request could be admitted, its deadline aside (`Decision.fits`)."""
        if not batch.slots:
            return True
        best_effort = request.kind is ServiceKind.BEST_EFFORT
        slots = batch.slots if best_effort else batch.slots_in_use
        if slots >= batch.engine.max_num_seqs or not lookahead.fits(request):
            return False
        if request.kind is not ServiceKind.PACED or request.pace_s is None:
            return True
        decoding, context = (
            batch.decoding + request.sequences,
            batch.context + request.prompt_tokens * request.sequences,
        )
        step_s = batch.engine.step_time.curve.step_s(decoding, context)
        return step_s <= min(batch.strictest_s, request.pace_s)

    def _hold_s(self, batch: RunningBatch, lookahead: PrefillLookahead) -> float:
        """For how long the engine has enough prompts: until one chunk of them is left, at most one step.

        With less than one chunk in the engine, requests do not wait for want of prompts, and what changes during the
        step under way is early enough at its end.
        """
        chunk, tokens = batch.chunk_tokens, lookahead.tokens
        step_s = batch.step_s + batch.prefill_token_s * min(tokens, chunk)
        return min(batch.strictest_s, step_s) * (min(tokens / chunk - 1, 1.0) if tokens >= chunk else 1.0)
