"""`slack`: past SCORPIO. Feasibility as arithmetic, and under overload the requests that cost least.

The invariant: **what runs can keep its pace, and what waits can still be on time.** With the running set R, its
strictest bound P* = min P_i, and T(R) what a step takes in which all of R decode,

    T(R) <= P*                                  everybody keeps pace (SCORPIO's eq. 8, without its factor eta),
    share = 1 - T(R)/P*                         of time is left for prefill,
    est_k = sum over j <= k of mu*p_j / share   is when the k-th prompt in the queue is done,
    sum of m_i + z * sqrt(sum of s_i^2) <= M    the KV memory suffices, but for a chance of ``memory_risk``,
    chunk = (P* - T(R)) / mu(R)                 prompt tokens are what a step has time for,

where a prompt token costs mu(R) beside what runs (`step_curve`), and request i has p_i prompt tokens, y_i more
predicted, and is expected to reach a length of m_i, uncertain by s_i; M is the KV memory, in tokens. P_i is
``tpot_target_fraction`` of
the bound. An end-to-end bound leaves a pace: what is left of it after the first token, over y_i; and is none: once the
request runs, `E2E_EASE` times that is its P_i.

A request is admitted only if pace and memory suffice with it, and the prompts in the engine and its own are done in
time; it is refused as soon as est says that its deadline cannot be met. Who does not fit now never blocks the one
behind (skip-over earliest deadline first). When not all can be served, those go first that take the least time of the
engine,

    w_i = mu * p_i + (d + a * (its mean length)) * y_i,

where d is what a decode costs (no less than a token of prompt: it holds a place besides) and a what a token of its
context does: the time there is yields the most attained requests. But no SLO class and no tenant falls behind the rest
by more than a stated share (`gateway.policies.slack.fair_share`); paces that are all but the engine's own are the
exception
(`gateway.policies.slack.tight_tpot`). Requests that nothing bounds take what is left, and once they have waited for
``max_wait_s`` they go first, up to a stated share of the places. To the others the places and the memory that they have
beyond that share count as free: in a full engine they make way (`engine_adapter.gates.best_effort_preemption`).
Inside the engine,
`slack_gate` gives prefill what running requests can spare; no more than a few chunks lie there unprefilled, so that who
goes next is decided here, as late as can be, and among all who came while the engine had enough to do.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import compress

import numpy as np
from numpy.typing import NDArray

from engine_adapter.engine import EngineState
from engine_adapter.gates.best_effort_preemption import RecentPeak, reserved_slots
from gateway.policies.base import LOOK_AGAIN_S, Decision, PrefillLookahead, Rejection, reject_tpot, reject_ttft
from gateway.policies.slack.batch import NO_HURRY_S, Load, Queue
from gateway.policies.slack.fair_share import FairShare
from gateway.policies.slack.tight_tpot import QUIET_S, DearPace
from gateway.requests.request import Request
from gateway.requests.waiting_queue import arrays_of

_LEAST_SHARE = 0.02
"""However full the batch, prefill goes on: decodes end."""

_LASTS_AT_MOST_S = 0.15
"""However loose the paces: who is refused should hear of it soon."""


@dataclass(slots=True)
class Slack:
    """``tpot_target_fraction``: the share of its TPOT bound by which a request is paced; where steps vary, whoever
    is paced by all of
    it ends late now and then. ``cost_weight``: seconds of deadline that a second of engine time counts for when
    choosing
    whom to admit (0: deadlines alone). ``min_admission_share``: the share of the overall admission rate that every
    SLO class and
    tenant gets (0: no floor). ``memory_risk``: the chance that what runs outgrows the KV memory. ``max_wait_s``: a
    request with a pace to keep but no TTFT bound is due so long after it came, and one without any bound has its share
    of the places. ``queue_discount``: the share of its estimate by which a prompt is judged too late; the queue
    ahead of it
    thins out. ``prefill_lookahead_steps``: chunks that may lie in the engine unprefilled: one that goes into the
    step under way,
    and one for the next.
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
    _granted: FairShare = field(init=False, repr=False, compare=False)
    _dear: DearPace = field(default_factory=DearPace, init=False, repr=False, compare=False)
    _wanted: RecentPeak = field(default_factory=RecentPeak, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if not 0 < self.tpot_target_fraction <= 1:
            raise ValueError(f"fill must be above 0 and at most 1, but it is {self.tpot_target_fraction!r}")
        if not 0 < self.memory_risk < 1:
            raise ValueError(f"memory_risk must be between 0 and 1, but it is {self.memory_risk!r}")
        self._granted = FairShare(self.min_admission_share)

    def order(self, request: Request) -> tuple[float, ...]:
        """Earliest deadline first; what nothing bounds comes after, by arrival."""
        if is_unbounded(request):
            return (math.inf, request.arrival_s)
        return (min(request.deadline_s, request.arrival_s + self.max_wait_s), request.arrival_s)

    def decide(
        self, now: float, waiting: Sequence[Request], running: Collection[Request], engine: EngineState
    ) -> Decision:
        """Refuse what cannot be on time, admit the least costly of the rest while everybody keeps pace."""
        decision = Decision()
        if not waiting:
            return decision
        load = Load.of(running, self.memory_risk, engine)
        lookahead = PrefillLookahead.of(running, self.prefill_lookahead_steps * load.chunk(engine))
        bounded, unbounded = _by_bounds(waiting)
        arrays = arrays_of(waiting, len(bounded))
        queue = Queue.of(bounded, load.prefill_token_s(engine), self.max_wait_s, self.tpot_target_fraction, arrays)
        queue.pace_ends(now, load, lookahead.tokens, self.tpot_target_fraction, engine)
        queue = self._refuse_hopeless_pace(queue, engine, decision)
        queue, held_off = self._hold_off(now, queue, running, engine)
        queue = self._refuse_late(now, queue, load, lookahead.tokens, engine, decision)
        patient = [r for r in unbounded if now - r.arrival_s > self.max_wait_s]
        slots = reserved_slots(engine.max_num_seqs)
        self._admit_unbounded(patient, slots, load, lookahead, engine, decision, overdue=True)
        taken = {request.id for request in decision.admit}
        left = [request for request in unbounded if request.id not in taken] if taken else unbounded
        held_back = self._admit_bounded(now, queue, load, lookahead, engine, decision)
        others = load.slots - load.unbounded
        lately = int(self._wanted.note(now, others))
        if not held_back:
            # While there are others, what they took lately is left to them.
            slots = max(slots, engine.max_num_seqs - lately) if others else engine.max_num_seqs
        self._admit_unbounded(left, slots, load, lookahead, engine, decision)
        self._granted.note(decision)
        self._dear.note(now, decision, queue.requests if held_back else ())
        decision.reject += held_off
        decision.fits = partial(self._fits, load=load, lookahead=lookahead, engine=engine)
        decision.stands_s = min(self._stands_s(load, lookahead, engine), LOOK_AGAIN_S)
        decision.lasts_s = min(self.prefill_lookahead_steps * load.strictest, _LASTS_AT_MOST_S)
        return decision

    def _refuse_hopeless_pace(self, queue: Queue, engine: EngineState, decision: Decision) -> Queue:
        """A TPOT bound that even an otherwise idle engine would break, or all but break, is refused at once."""
        alone_s = queue.decode_alone_s(engine)
        infeasible = alone_s > queue.tpot_s
        if not infeasible.any():
            return queue
        for at in np.flatnonzero(infeasible).tolist():
            request, attainable_s = queue.requests[at], float(alone_s[at]) / self.tpot_target_fraction
            if request.tpot_slo_s is not None and attainable_s <= request.tpot_slo_s:
                infeasible[at] = False  # With its end-to-end bound it has waited too long, which is another matter.
            else:
                decision.reject.append(reject_tpot(request, attainable_s, 0.0, infeasible=True))
        return queue.only(~infeasible) if infeasible.any() else queue

    def _hold_off(
        self, now: float, queue: Queue, running: Collection[Request], engine: EngineState
    ) -> tuple[Queue, list[Rejection]]:
        """Whom a pace is refused at once since it costs the others more than it brings. They count for no floor."""
        self._dear.look(now, engine.step_time.curve.step_s(1, 0) / self.tpot_target_fraction, running)
        if not self._dear.held_off:
            return queue, []
        dear = np.array(self._dear.which(queue.requests), dtype=bool)
        would_do_s = self._dear.below_s
        refused = [
            Rejection(request, "tpot", would_do_s, would_do_s, QUIET_S)
            for request in compress(queue.requests, dear.tolist())
        ]
        return queue.only(~dear), refused

    def _refuse_late(
        self, now: float, queue: Queue, load: Load, unprefilled: int, engine: EngineState, decision: Decision
    ) -> Queue:
        """Walk the queue in deadline order; what cannot have its first token in time is refused."""
        busy, curve = load.step_s(engine), engine.step_time.curve
        full_stretch = 1 / max(_LEAST_SHARE, 1 - busy / load.strictest)
        stretch = self.queue_discount * full_stretch
        # The step under way must end, and the one that brings the first token takes what any step takes.
        step = max(busy, curve.step_s(1, 0))
        fixed = now + busy / 2 + step + curve.h
        work = load.prefill_token_s(engine) * unprefilled
        # The queue ahead thins out, a request's own prompt does not.
        own_s = (full_stretch - stretch) * queue.prefill_s
        deadline = queue.arrays.deadline
        margin = deadline - (fixed + stretch * (work + np.cumsum(queue.prefill_s)) + own_s)
        late = margin < 0
        if late.any():
            # One that is refused is not ahead of those behind it, so from the first on they must be taken one by one.
            first = int(np.argmax(late))
            work += float(queue.prefill_s[:first].sum())
            left = zip(deadline[first:].tolist(), queue.prefill_s[first:].tolist(), strict=True)
            for at, (due, own) in enumerate(left, first):
                late_by = fixed + stretch * work + full_stretch * own - due
                margin[at] = -late_by
                if late_by <= 0:
                    work += own
                    continue
                request = queue.requests[at]
                predicted_s = request.ttft_slo_s + late_by
                # Asking again takes a moment, and optimism is not for promises: without it, and a step to spare.
                attainable_s = predicted_s + (full_stretch - stretch) * work + step
                infeasible = curve.step_s(0, 0, request.prompt_tokens) > request.ttft_slo_s
                decision.reject.append(reject_ttft(request, predicted_s, attainable_s, late_by, infeasible))
            late = margin < 0
            queue, margin = queue.only(~late), margin[~late]
        least = float(margin.min(initial=math.inf))
        if least < math.inf:
            decision.recheck_at = now + least
        return queue

    def _admit_bounded(
        self, now: float, queue: Queue, load: Load, lookahead: PrefillLookahead, engine: EngineState, decision: Decision
    ) -> bool:
        """Admit the least costly that keep the invariant; whether any is left waiting."""
        if load.without_who_makes_way().slots >= engine.max_num_seqs:
            return len(queue.requests) > 0
        # Of those with room nearly all hold the invariant: they are tried in turn, and seen to only once one does not.
        able = np.flatnonzero(self._room(queue, load, lookahead, engine))
        first, turn = self._in_turn(now, queue, able, load, engine)
        admitted, waiting_tokens = 0, float(queue.arrays.prompt.sum())
        if turn is not None:
            # Shorter prompts may never let the runway run empty: it does not wait for that.
            first = np.concatenate([[turn], first[first != turn]])
        while len(first) and load.without_who_makes_way().slots < engine.max_num_seqs:
            at, first = int(first[0]), first[1:]
            request, pace_s = queue.requests[at], float(queue.tpot_s[at])
            more, others = load.plus(request, pace_s), waiting_tokens - request.prompt_tokens
            # An idle engine takes it, whatever may come after: whether it keeps its pace was seen to.
            if more.slots > request.sequences and not (
                lookahead.fits(request, its_turn=at == turn)
                and self._keeps_pace(more, pace_s, engine)
                and now + more.prefilled_in_s(lookahead.tokens, request.prompt_tokens, others, engine)
                <= request.deadline_s
            ):
                # Those before it took its room, and that of most behind it: they are looked at together.
                first = self._holding(now, queue, first, load, lookahead, engine)
                continue
            eased_s = float(queue.eased_s[at])
            load.take(more if eased_s == pace_s else load.plus(request, eased_s))
            lookahead.add(request)
            decision.admit.append(request)
            if eased_s != request.tpot_slo_s and eased_s < math.inf:
                decision.paces[request.id] = eased_s
            admitted += 1
        return admitted < len(queue.requests)

    def _in_turn(
        self, now: float, queue: Queue, able: NDArray[np.intp], load: Load, engine: EngineState
    ) -> tuple[NDArray[np.intp], int | None]:
        """Those ``able`` to go, in the order in which they are tried; and who of all is first, if for a claim.

        A claim: behind, or out of patience.
        """
        token_s, curve = load.prefill_token_s(engine), engine.step_time.curve
        prices = token_s, token_s + max(-curve.e, 0.0), curve.a
        claims, behind = queue.due < now, self._granted.behind()
        if behind:
            claims |= np.array(behind.which(queue.requests), dtype=bool)

        def comes_at(at: NDArray[np.intp]) -> NDArray[np.float64]:
            return queue.due[at] + self.cost_weight * queue.cost_s(*prices, at)

        order = able[np.lexsort((comes_at(able), ~claims[able]))] if len(able) > 1 else able
        claimants = np.flatnonzero(claims)
        return order, int(claimants[np.argmin(comes_at(claimants))]) if len(claimants) else None

    def _room(self, queue: Queue, load: Load, lookahead: PrefillLookahead, engine: EngineState) -> NDArray[np.bool_]:
        """Who finds places beside ``load``, and room for the prompt. An idle engine takes anyone."""
        if not load.slots:
            return np.ones(len(queue.requests), dtype=bool)
        taken = np.where(queue.tpot_s < math.inf, load.without_who_makes_way().slots, load.slots)
        room = taken + queue.arrays.sequences <= engine.max_num_seqs
        if lookahead.tokens:
            room &= lookahead.tokens + queue.arrays.prompt <= lookahead.limit
        return room

    def _holding(
        self,
        now: float,
        queue: Queue,
        of: NDArray[np.intp],
        load: Load,
        lookahead: PrefillLookahead,
        engine: EngineState,
    ) -> NDArray[np.intp]:
        """Those ``of`` the queue with room for whom the invariant holds, were they to run beside ``load``."""
        of = of[self._room(queue, load, lookahead, engine)[of]]
        if not len(of):
            return of
        return of[queue.holds_with(load, lookahead.tokens, queue.arrays.deadline[of] - now, engine, of)]

    def _fits(self, request: Request, load: Load, lookahead: PrefillLookahead, engine: EngineState) -> bool:
        """Whether a newcomer could go beside ``load``, its deadline and those that wait left aside."""
        if not load.slots:
            return True
        if is_unbounded(request):
            return lookahead.fits(request) and load.slots < engine.max_num_seqs
        bound = NO_HURRY_S if request.tpot_slo_s is None or request.best_effort else request.tpot_slo_s
        return lookahead.fits(request) and self._keeps_pace(load.plus(request, bound), bound, engine)

    def _stands_s(self, load: Load, lookahead: PrefillLookahead, engine: EngineState) -> float:
        """For how long the engine has enough of what it was given, while others wait: a step at most.

        With n chunks to prefill until one is left to begin with. With less than one it is not for want of prompts that
        they wait, and what changes in the step under way is soon enough decided on when it ends.
        """
        chunk = load.chunk(engine)
        step = load.step_s(engine) + load.prefill_token_s(engine) * min(lookahead.tokens, chunk)
        steps = min(lookahead.tokens / chunk - 1, 1.0) if lookahead.tokens >= chunk else 1.0
        return min(load.strictest, step) * steps

    def _keeps_pace(self, more: Load, pace_s: float, engine: EngineState) -> bool:
        """Whether ``more`` have places, and keep pace, and have memory; the latest has to keep ``pace_s``."""
        if pace_s < math.inf:
            more = more.without_who_makes_way()
        return more.slots <= engine.max_num_seqs and more.step_s(engine) <= more.strictest and more.fits_memory(engine)

    def _admit_unbounded(
        self,
        unbounded: Sequence[Request],
        most: float,
        load: Load,
        lookahead: PrefillLookahead,
        engine: EngineState,
        decision: Decision,
        overdue: bool = False,
    ) -> None:
        """By arrival, into the places that are left, up to ``most`` of them. ``overdue``: the runway is no reason.

        One that does not fit holds up those behind it only while others of its kind run: when these have ended it may.
        """
        skips = 0 if load.unbounded else engine.max_num_seqs
        for request in unbounded:
            if load.unbounded and load.unbounded + request.sequences > most:
                break
            if not (overdue or lookahead.fits(request)):
                break
            more = load.plus(request)
            if load.slots and not (more.slots <= engine.max_num_seqs and more.fits_memory(engine)):
                if not skips or load.slots >= engine.max_num_seqs:
                    break
                skips -= 1
                continue
            load.take(more)
            lookahead.add(request)
            decision.admit.append(request)
            if request.tpot_slo_s is not None:
                decision.paces[request.id] = math.inf  # Its bound is not insisted on.


def _by_bounds(waiting: Sequence[Request]) -> tuple[Sequence[Request], Sequence[Request]]:
    """Those with bounds, and those without, which by `Slack.order` come last."""
    bounded = len(waiting)
    if is_unbounded(waiting[-1]):
        arrays = arrays_of(waiting)
        bounds = np.flatnonzero(np.minimum(arrays.deadline, arrays.tpot) < math.inf)
        bounded = int(bounds[-1]) + 1 if len(bounds) else 0
    return waiting[:bounded], waiting[bounded:]


def is_unbounded(request: Request) -> bool:
    """Nothing bounds it, or nobody insists: it takes what is left."""
    return request.deadline_s == math.inf and (request.tpot_slo_s is None or request.best_effort)
