"""One engine's lane: its class queues, its running set, its policy instance.

Nothing in a lane knows that other engines exist. Decisions are made on the event loop, coalesced: however many events
fall into one turn of the loop, the policy decides once. And only where there is news
(`AdmissionController.decides`): most steps
change nothing that a policy could act on. While requests wait, deciding takes `DECIDING_SHARE` of the time, as far as
the engine can wait so long.
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from engine_adapter.engine import Engine
from gateway.policies.base import UNGATED, Decision, Policy, Rejection, prefill_backlog
from gateway.requests.request import Request
from gateway.requests.slo import SloClass
from gateway.requests.waiting_queue import WaitingQueue
from gateway.scheduling.admission import AdmissionController
from gateway.scheduling.shadow import Shadow
from gateway.scheduling.shadow_runner import ShadowRunner

log = logging.getLogger("antares.lane")

Clock = Callable[[], float]

DECIDING_SHARE = 0.008
"""Of the time, while requests wait. Who takes long to decide is asked less often, but as the engine needs it all the
same (`Decision.lasts_s`): so that it is about a hundredth where a decision takes a millisecond."""

PROBE_EVERY_S = 10.0
"""At most so often an idle engine that has requests refused is probed, and not so soon after it has learnt from a
request that it served: that is not doubted."""


@dataclass(slots=True, frozen=True)
class EngineDown:
    """The lane's engine is down and will not be back in time for this request."""

    retry_after_s: float


@dataclass(slots=True, frozen=True)
class QueueFull:
    """The request's class queue is at its limit."""

    limit: int
    retry_after_s: float


@dataclass(slots=True, frozen=True)
class Admitted:
    """Go: ``lane`` serves the request; its first token was expected ``predicted_ttft_s`` after arrival."""

    engine_queue: EngineQueue
    predicted_ttft_s: float | None


@dataclass(slots=True, frozen=True)
class Reroute:
    """This lane's engine is down, but another's is not: place the request again."""


QueueOutcome = Reroute | Admitted | Rejection | EngineDown | QueueFull


class EngineQueue:
    """Queues in front of one engine. ``unbounded_wait_s``: how long to wait for a dead one without a TTFT bound.

    ``shadow``: policies by name that decide nothing, beside the one that does (`gateway.scheduling.shadow`).
    """

    def __init__(
        self,
        engine: Engine,
        policy: Policy,
        classes: dict[str, SloClass],
        *,
        clock: Clock = time.monotonic,
        unbounded_wait_s: float = 120.0,
        on_decided: Callable[[float], None] = lambda seconds: None,
        shadow: Mapping[str, Policy] | None = None,
    ) -> None:
        self.engine = engine
        self.classes = classes
        self.admission = AdmissionController(policy, engine.state, self._serves_best_effort)
        beside = [
            Shadow(name, policy, engine.state, classes, self._serves_best_effort)
            for name, policy in (shadow or {}).items()
        ]
        self.shadows = ShadowRunner(beside, engine.state, clock)
        self.decisions = 0
        self.deciding_s = 0.0
        self.another_engine_alive: Callable[[], bool] = lambda: False
        self._clock = clock
        self._unbounded_wait_s = unbounded_wait_s
        self._on_decided = on_decided
        self._outcomes: dict[str, asyncio.Future[QueueOutcome]] = {}
        self._scheduled = False
        self._timer: asyncio.TimerHandle | None = None
        self._timer_due_s = math.inf
        self._down_since: float | None = None
        self._probed_at = -math.inf
        self._believed, self._learnt_at = engine.state.step_time.curve, -math.inf
        self._probe: asyncio.Task[None] | None = None

    @property
    def policy(self) -> Policy:
        """Who decides."""
        return self.admission.policy

    @property
    def waiting(self) -> WaitingQueue:
        """What waits, over the classes."""
        return self.admission.waiting

    @property
    def running(self) -> dict[str, Request]:
        """What was admitted to the engine and is not through with it."""
        return self.admission.running

    # --- events ---------------------------------------------------------------------------------------------------

    def submit(self, request: Request) -> asyncio.Future[QueueOutcome]:
        """Queue ``request``; the future tells what was decided. A full class queue answers at once."""
        verdict: asyncio.Future[QueueOutcome] = asyncio.get_running_loop().create_future()
        self.shadows.submitted(request)
        limit = self.classes[request.slo_class].max_waiting
        if self.waiting.by_class[request.slo_class] >= limit:
            # A place is free once what waits has been prefilled, at the latest.
            self.shadows.rejected(request)
            verdict.set_result(QueueFull(limit, retry_after_s=max(1.0, self.admission.queued_prefill_s())))
            return verdict
        self.admission.submit(request)
        self._outcomes[request.id] = verdict
        self.wake()
        return verdict

    def withdraw(self, request: Request) -> None:
        """The client left while its request waited."""
        self.shadows.withdrawn(request)
        self._outcomes.pop(request.id, None)
        if self.admission.withdraw(request):
            self.wake()

    def leave(self, request: Request) -> None:
        """An admitted request is through with the engine, however it ended."""
        if self.admission.leave(request):
            curve = self.engine.state.step_time.curve
            if curve is not self._believed:
                self._believed, self._learnt_at = curve, self._clock()
            self.shadows.left(request)
            self.wake()

    def on_alive(self, alive: bool) -> None:
        """The engine came up or went down."""
        self._down_since = None if alive else self._clock()
        if not alive:
            self.shadows.engine_lost()
        self.admission.makes_room()
        self.wake()

    def on_first_token(self) -> None:
        """An answer began: its prompt is out of the way."""
        self.admission.makes_room()
        self.wake()

    def wake(self) -> None:
        """Something may have changed: see to it in this turn of the event loop, once."""
        if not self._scheduled and self.waiting:
            self._scheduled = True
            asyncio.get_running_loop().call_soon(self._decide)
        self.shadows.wake()

    def close(self) -> None:
        """The gateway shuts down: stop the timer, turn away what still waits."""
        if self._timer is not None:
            self._timer.cancel()
        self.shadows.close()
        for request in list(self.waiting):
            self._turn_away(request, EngineDown(retry_after_s=5.0))

    # --- the decision -----------------------------------------------------------------------------------------------

    def _decide(self) -> None:
        self._scheduled = False
        now = self._clock()
        if not self.engine.state.alive:
            self._turn_away_what_cannot_wait(now)
            return
        if not self.admission.decides(now):
            if self.waiting and self.admission.look_again_s < self._timer_due_s:
                self._set_timer(now, self.admission.look_again_s)
            return
        started = time.perf_counter()
        try:
            backlog_s = prefill_backlog(self.running.values(), self.engine.state)
            decision = self.admission.decide(now)
            self._apply(now, decision, backlog_s)
        except Exception as error:
            self._fail_all_waiting(error)
            return
        self.decisions += 1
        spent = time.perf_counter() - started
        self.deciding_s += spent
        self._on_decided(spent)
        self.admission.rest_until(now + min(spent / DECIDING_SHARE, decision.lasts_s))
        self._set_timer(now, self.admission.look_again_s if self.waiting else None)

    def _apply(self, now: float, decision: Decision, backlog_s: float) -> None:
        """Tell those who wait what was decided; ``backlog_s`` of prefill work was in the engine before."""
        if decision.reject and len(self.running) == len(decision.admit):
            self._doubt(now)
        for request in decision.admit:
            backlog_s += self.engine.state.step_time.prefill(request.prompt_tokens)
            told = self.policy.gate != UNGATED or request.slo.ttft_s
            predicted_s = now - request.arrival_s + backlog_s if told else None
            if self._tell(request, Admitted(self, predicted_s)):
                self.shadows.admitted(request)
            else:
                # The client left in this very turn: nobody will run the request, so it must not count as running.
                self.admission.leave(request)
                self.shadows.withdrawn(request)
        for rejection in decision.reject:
            self.shadows.rejected(rejection.request)
            self._tell(rejection.request, rejection)

    def _serves_best_effort(self, request: Request) -> bool:
        return self.classes[request.slo_class].on_unattainable == "best_effort"

    def _tell(self, request: Request, verdict: QueueOutcome) -> bool:
        waiting = self._outcomes.pop(request.id, None)
        if waiting is None or waiting.done():
            return False
        waiting.set_result(verdict)
        return True

    def _turn_away(self, request: Request, verdict: QueueOutcome) -> None:
        self.admission.withdraw(request)
        self.shadows.withdrawn(request)
        self._tell(request, verdict)

    def _fail_all_waiting(self, error: Exception) -> None:
        """A bug in a policy must not keep requests waiting for ever, nor the one that brought it out fail the next."""
        log.error("policy %s failed: %s", self.policy.name, type(error).__name__, exc_info=error)
        verdicts = list(self._outcomes.values())
        self._outcomes.clear()
        for request in self.waiting:
            self.shadows.withdrawn(request)
        self.waiting.clear()
        for verdict in verdicts:
            if not verdict.done():
                verdict.set_exception(error)

    def _turn_away_what_cannot_wait(self, now: float) -> None:
        if self.another_engine_alive():
            for request in list(self.waiting):
                self._turn_away(request, Reroute())
            return
        expected_in = self._expected_in_s(now)
        for request in list(self.waiting):
            patience = min(request.deadline_s, request.arrival_s + self._unbounded_wait_s)
            if now + expected_in > patience:
                self._turn_away(request, EngineDown(retry_after_s=self.back_in_s(now)))
        # The expected time of return may slip: look again.
        self._set_timer(now, now + min(0.5, expected_in) if self.waiting else None)

    def _doubt(self, now: float) -> None:
        """An idle engine refuses: its step times may be out of date, and nothing it serves will correct them."""
        if now - max(self._probed_at, self._learnt_at) >= PROBE_EVERY_S:
            self._probed_at = now
            self._probe = asyncio.create_task(self.engine.probe(), name=f"probe {self.engine.name}")

    def back_in_s(self, now: float) -> float:
        """Seconds until a dead engine is expected back, at least one: what clients are told."""
        return max(1.0, self._expected_in_s(now))

    def _expected_in_s(self, now: float) -> float:
        """Seconds until a dead engine is expected back; where it is overdue, one more."""
        down_for = now - self._down_since if self._down_since is not None else 0.0
        left = self.engine.state.ready_in_s - down_for
        return left if left > 0 else 1.0

    def _set_timer(self, now: float, at: float | None) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        self._timer_due_s = math.inf if at is None else at
        if at is not None:
            delay = max(0.001, at - now)
            self._timer = asyncio.get_running_loop().call_later(delay, self._timer_fired)

    def _timer_fired(self) -> None:
        self._timer, self._timer_due_s = None, math.inf
        self.wake()
