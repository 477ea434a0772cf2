"""Admission to one engine: asks the policy and applies its answer to the waiting and running requests.

It has no clock, no event loop and no engine. The gateway drives it in real time
(`gateway.scheduling.engine_queue`), the simulator in virtual time.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from engine_adapter.engine import EngineState
from engine_adapter.service_kind import ServiceKind
from gateway.policies.base import MAX_DECISION_INTERVAL_S, Decision, Policy
from gateway.requests.prefix_index import PrefixIndex
from gateway.requests.request import Request
from gateway.requests.waiting_queue import WaitingQueue
from gateway.scheduling.decision_schedule import DecisionSchedule
from gateway.scheduling.delays import note_handover, overdue_s
from gateway.scheduling.expected_batch import MAX_AGE_S, ExpectedBatch
from gateway.scheduling.room import Room

DECISION_GRACE_S = 2 * MAX_DECISION_INTERVAL_S
"""A request that has waited for longer was kept waiting by at least one decision."""

MIN_ARRAY = 64
"""Waiting requests from which their oldest arrival is found with an array: below, a loop is as fast."""


@dataclass(slots=True, eq=False)
class AdmissionController:
    """The waiting queue and the running set of one engine.

    INVARIANT: a submitted request is in ``waiting``, in ``running``, or has been rejected or withdrawn or has left.

    ``serves_best_effort`` says of a request that cannot attain its SLO whether its class serves it without bounds.
    ``prefixes`` predicts the prefix-cache hits of the requests. ``phase``, from 0 to 1, shortens the life of the sums
    over all requests by up to half. Engines have different phases, so that no decision makes the sums of many again.
    """

    policy: Policy
    engine: EngineState
    serves_best_effort: Callable[[Request], bool] = lambda request: False
    prefixes: PrefixIndex = field(default_factory=PrefixIndex)
    phase: float = 0.0
    waiting: WaitingQueue = field(init=False)
    running: dict[str, Request] = field(default_factory=dict)
    schedule: DecisionSchedule = field(default_factory=DecisionSchedule)
    _expected: ExpectedBatch | None = field(init=False, default=None)
    _room: Room | None = field(init=False, default=None)
    _changed: bool = field(init=False, default=False)
    """Whether an answer began or a request left since ``_room`` was made."""

    def __post_init__(self) -> None:
        self.waiting = WaitingQueue(self.policy.order)

    @property
    def busy(self) -> bool:
        """Whether requests wait and the engine has work."""
        return bool(self.running and self.waiting)

    def set_policy(self, policy: Policy) -> None:
        """Have ``policy`` decide from now on. Waiting requests get its order; running ones stay as they are."""
        self.policy = policy
        self.waiting.set_order(policy.order)
        self.capacity_changed()

    def submit(self, request: Request) -> None:
        """Queue ``request``."""
        if not self.engine.prefix_caching:
            request.blocks = ()
            request.cached_tokens = request.shared_tokens = 0
        self.prefixes.wait(request)
        self.waiting.add(request)
        if self._expected is not None:
            self._expected.add((request,))
        if self._room is not None:
            self._room.add(request)
        self.schedule.on_change(self.busy and len(self.waiting) > 1)

    def withdraw(self, request: Request) -> bool:
        """Remove a waiting request; return False when it does not wait."""
        removed = self.waiting.remove(request)
        self.prefixes.withdraw(request)
        if removed and self._expected is not None:
            self._expected.remove(request)
        self._on_change()
        return removed

    def leave(self, request: Request) -> bool:
        """Remove an admitted request that has ended in any way; return False when it does not run."""
        ran = self.running.pop(request.id, None) is not None
        self.prefixes.release(request)
        if ran and self._expected is not None:
            self._expected.remove(request)
        self._on_change()
        return ran

    def on_first_token(self, request: Request) -> None:
        """Note that the answer of ``request`` began: its prompt is computed, so others may fit."""
        if self._expected is not None:
            self._expected.begin(request)
        self._on_change()

    def capacity_changed(self) -> None:
        """Note that a request which did not fit may fit now, for any other reason."""
        self._expected = None
        self._on_change()

    def _on_change(self) -> None:
        self._changed = True
        self.schedule.on_change(self.busy)

    def decision_due(self, now: float) -> bool:
        """Whether there is something to decide at ``now``."""
        return len(self.waiting) > 0 and self.schedule.is_due(now)

    def decide(self, now: float) -> Decision:
        """Ask the policy at ``now`` (monotonic s) and apply its decision.

        A rejected request whose class serves best effort keeps waiting without its bounds. It is then not among the
        rejections of the decision that is returned, and ``recheck_at`` is ``now``.
        """
        self._update_prefix_hits()
        # What the policy admits reaches the engine, and its step under way ends, that much later.
        delay_s = self.engine.handover_s + overdue_s(now, self.running.values(), self.engine)
        decision = self.policy.decide(now + delay_s, self.waiting, self.running.values(), self.engine)
        if decision.recheck_at is not None:
            decision.recheck_at -= delay_s
        if not (self.running or decision.admit):
            # Nothing is handed over, so the estimate would never fall.
            note_handover(self.engine, 0.0)
        expected = self._expected
        for request in decision.admit:
            self.waiting.remove(request)
            if expected is not None:
                expected.remove(request)
            request.admitted_s = now
            request.pace_s = decision.paces.get(request.id, request.pace_s)
            if request.id in decision.yielding:
                request.kind = ServiceKind.YIELDING
            self.running[request.id] = request
            self.prefixes.admit(request)
            if expected is not None:
                expected.add((request,))
        rejected = []
        for rejection in decision.reject:
            request = rejection.request
            if not request.bounds_waived and self.serves_best_effort(request):
                request.serve_at_best_effort()
                self.waiting.reorder(request)
                decision.recheck_at = now
            else:
                self.waiting.remove(request)
                self.prefixes.withdraw(request)
                if expected is not None:
                    expected.remove(request)
                rejected.append(rejection)
        waived = len(rejected) < len(decision.reject)
        if waived:
            self._expected = None
        decision.reject = rejected
        self.schedule.on_decision(now, decision, self.busy and not waived)
        return decision

    def _update_prefix_hits(self) -> None:
        expected = self._expected
        for request in self.prefixes.update_waiting():
            self.waiting.reorder(request)
            if expected is not None:
                expected.recount(request)
        self.engine.shared_tokens = int(self.prefixes.shared_tokens)
        if expected is not None:
            expected.share(self.engine.shared_tokens)

    def has_ample_room(self, now: float, request: Request) -> bool:
        """Whether the output length of ``request`` decides nothing, because all requests attain their bounds.

        An end-to-end bound sets the pace by the length. Otherwise see `Room.is_ample_for`.
        """
        if request.slo.e2e_s is not None:
            return False
        room, prefill_s = self._room, self.prefill_s(request)
        if room is not None and now < room.until_s:
            ample = room.is_ample_for(request, prefill_s, now)
            if ample or not self._changed:
                return ample
        requests = [*self.running.values(), *self.waiting]
        room = self._room = Room(now, self.engine, requests)
        self._changed = False
        return room.is_ample_for(request, prefill_s, now)

    def expected_batch(self, now: float) -> ExpectedBatch:
        """Return all requests of this engine as one batch, at most `MAX_AGE_S` old at ``now`` (monotonic s)."""
        batch = self._expected
        if batch is None or batch.outdated or now > batch.until_s:
            until_s = now + MAX_AGE_S * (1 - self.phase / 2)
            batch = self._expected = ExpectedBatch(self.running.values(), self.waiting, self.engine, until_s)
        return batch

    def next_admission_in_s(self, now: float) -> float:
        """Return the expected seconds until a waiting request leaves the queue, of a queue that is full.

        The prompts ahead must be prefilled. If a request has waited for longer than that explains, it waits for the
        running requests, so the first of them must end too.
        """
        work = self.expected_batch(now).prefill_s
        if len(self.waiting) < MIN_ARRAY:
            oldest_s = max((now - request.arrival_s for request in self.waiting), default=0.0)
        else:
            oldest_s = now - float(self.waiting.arrays().arrival.min())
        free = self.engine.max_num_seqs - sum(request.sequences for request in self.running.values())
        if not self.running or (free > 0 and oldest_s < max(work, DECISION_GRACE_S)):
            return work
        return work + self.first_end_in_s(now)

    def first_end_in_s(self, now: float) -> float:
        """Return the expected seconds until the first running request ends; 0 if none runs."""
        running = self.running.values()
        if not running:
            return 0.0
        sequences = sum(request.sequences for request in running)
        context = sum(request.length * request.sequences for request in running)
        token_s = self.engine.step_time.curve.step_s(sequences, context) / self.engine.tokens_per_step
        return min(_remaining_s(request, token_s, now) for request in running)

    def prefill_s(self, request: Request) -> float:
        """Return the seconds of prefill that ``request`` would take here, which depend on the prefix cache."""
        cached = self.prefixes.cached_tokens(request) if request.blocks and self.engine.prefix_caching else 0
        return self.engine.step_time.prefill(max(1, request.prompt_tokens - cached))


def _remaining_s(request: Request, token_s: float, now: float) -> float:
    """Return the expected seconds until a running request ends, at ``token_s`` s per token or as slow as until now."""
    seconds = request.remaining_tokens * max(token_s, request.mean_tpot_s(now))
    if request.unobserved and request.admitted_s is not None:
        # Its tokens are not counted, but its time is.
        return max(seconds - (now - request.admitted_s), token_s)
    return seconds
