"""Admission to one engine: what waits, what runs, and the policy that moves requests from the one to the other.

Without a clock, an event loop or an engine in it: the gateway drives it in real time
(`gateway.scheduling.engine_queue`), the simulator in
virtual time.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

from engine_adapter.engine import EngineState
from gateway.policies.base import LOOK_AGAIN_S, Decision, Policy, prefill_seconds
from gateway.requests.request import Request
from gateway.requests.waiting_queue import WaitingQueue


@dataclass(slots=True, eq=False)
class AdmissionController:
    """The books of one engine. A request is in ``waiting``, in ``running``, or gone.

    ``serves_best_effort`` says of a request that cannot attain its SLO whether it is served all the same.
    ``look_again_s``: when a decision is due, if any wait (monotonic s).
    """

    policy: Policy
    engine: EngineState
    serves_best_effort: Callable[[Request], bool] = lambda request: False
    waiting: WaitingQueue = field(init=False)
    running: dict[str, Request] = field(default_factory=dict)
    look_again_s: float = -math.inf
    _stands_until_s: float = -math.inf
    _latest: Decision = field(default_factory=Decision)

    def __post_init__(self) -> None:
        self.waiting = WaitingQueue(self.policy.order)

    def submit(self, request: Request) -> None:
        """``request`` waits from now on."""
        if not self.waiting:
            self._stands_until_s = -math.inf
        self.waiting.add(request)
        # After other news it is looked at anyway, and what fitted then may not be what fits now.
        if self.look_again_s > self._stands_until_s and self._latest.fits(request):
            self.look_again_s = self._stands_until_s

    def withdraw(self, request: Request) -> bool:
        """``request`` waits no more; False when it did not."""
        left = self.waiting.remove(request)
        self.makes_room()
        return left

    def leave(self, request: Request) -> bool:
        """An admitted request is through with the engine, however it ended; False when it did not run."""
        ran = self.running.pop(request.id, None) is not None
        self.makes_room()
        return ran

    def makes_room(self) -> None:
        """An answer began, or ended, or the engine is another: what did not fit may fit now."""
        if not (self.waiting and self.running):
            self._stands_until_s = -math.inf
        self.look_again_s = self._stands_until_s

    def decides(self, now: float) -> bool:
        """Whether there is somebody and something to decide at ``now``."""
        return len(self.waiting) > 0 and now >= self.look_again_s

    def decide(self, now: float) -> Decision:
        """Have the policy decide at ``now`` (monotonic s), and keep the books by its decision.

        What it admits runs and what it rejects is gone, unless it is to be served at best effort: that waits on
        without its bounds, is not among the rejected, and ``recheck_at`` is ``now``.
        """
        decision = self.policy.decide(now, self.waiting, self.running.values(), self.engine)
        for request in decision.admit:
            self.waiting.remove(request)
            request.admitted_s = now
            request.tpot_slo_s = decision.paces.get(request.id, request.tpot_slo_s)
            self.running[request.id] = request
        rejected = []
        for rejection in decision.reject:
            request = rejection.request
            if not request.best_effort and self.serves_best_effort(request):
                request.serve_at_best_effort()
                self.waiting.reorder(request)
                decision.recheck_at = now
            else:
                self.waiting.remove(request)
                rejected.append(rejection)
        turned = len(rejected) < len(decision.reject)
        decision.reject = rejected
        self._latest, self._stands_until_s = decision, -math.inf
        self.look_again_s = now + LOOK_AGAIN_S
        if decision.recheck_at is not None:
            self.look_again_s = min(self.look_again_s, decision.recheck_at)
        if not turned:
            self.rest_until(now + decision.stands_s)
        return decision

    def rest_until(self, at_s: float) -> None:
        """Nothing is decided before ``at_s`` (monotonic s), whatever comes; but where nobody waits, or nothing runs."""
        if self.waiting and self.running:
            self._stands_until_s = max(self._stands_until_s, at_s)
            self.look_again_s = max(self.look_again_s, self._stands_until_s)

    def queued_prefill_s(self) -> float:
        """Seconds of prefill work that wait."""
        return prefill_seconds(self.waiting, self.engine)

    def load(self) -> tuple[float, int]:
        """How much is ahead of a newcomer, to compare engines: seconds of prefill work, then requests."""
        unfinished = [r for r in self.running.values() if r.prefilling]
        work = self.queued_prefill_s() + prefill_seconds(unfinished, self.engine)
        return work, len(self.waiting) + len(self.running)
