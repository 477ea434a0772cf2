"""One engine's queue: the requests that wait for it and run on it, and the policy that decides about them.

An `EngineQueue` does not know that other engines exist. Decisions are made on the event loop and coalesced: the policy
decides once for all events of one loop iteration, when its `DecisionSchedule` says that a decision is due.
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
import zlib
from collections.abc import Callable, Collection, Mapping, Sequence

from engine_adapter.engine import Engine, PrefixCacheEvent
from gateway.policies.base import UNGATED, Decision, Policy
from gateway.requests.prefix_events import PrefixEvents
from gateway.requests.prefix_index import DEFAULT_CAPACITY_TOKENS
from gateway.requests.request import Request
from gateway.requests.slo import SloClass
from gateway.requests.waiting_queue import WaitingQueue
from gateway.scheduling.admission import AdmissionController
from gateway.scheduling.circuit_breaker import CircuitBreaker
from gateway.scheduling.delays import note_handover, work_ahead_s
from gateway.scheduling.queue_outcome import Admitted, Answers, Draining, EngineDown, QueueFull, QueueOutcome, Reroute
from gateway.scheduling.shadow import Shadow
from gateway.scheduling.shadow_runner import ShadowRunner

log = logging.getLogger("antares.engine_queue")

Clock = Callable[[], float]

PROBE_INTERVAL_S = 10.0
"""Minimum interval between probes of an idle engine that rejects requests. Skipped if its step-time model was just
updated by a request that it served."""

MAX_OUTAGE_WAIT_S = 120.0
"""Seconds that a request without a TTFT bound waits for an engine that is down. Convention."""

MIN_TIMER_S = 0.001
"""Resolution of the timer for the next decision."""


class EngineQueue:
    """The queue in front of one engine.

    Args:
        engine: the engine; ``engine.state`` is what the policy sees.
        policy: decides about this engine's requests.
        classes: the SLO classes by name.
        clock: monotonic seconds.
        on_decided: called with the seconds that each decision took.
        shadow: policies by name that run on copies and decide nothing (`gateway.scheduling.shadow`).
    """

    def __init__(
        self,
        engine: Engine,
        policy: Policy,
        classes: dict[str, SloClass],
        *,
        clock: Clock = time.monotonic,
        on_decided: Callable[[float], None] = lambda seconds: None,
        shadow: Mapping[str, Policy] | None = None,
    ) -> None:
        self.engine = engine
        self.classes = classes
        self.admission = AdmissionController(policy, engine.state, self._serves_best_effort)
        self.admission.phase = zlib.crc32(engine.name.encode()) / 2**32
        self.waiting: WaitingQueue = self.admission.waiting
        """The waiting requests of all classes."""
        self.running: dict[str, Request] = self.admission.running
        """The admitted requests that have not ended, by id."""
        shadows = [self._shadow(name, policy) for name, policy in (shadow or {}).items()]
        self.shadows = ShadowRunner(shadows, engine.state, clock)
        self.calls = 0
        """Calls of the engine's app outside scheduling that have not returned."""
        self.retired = False
        """Whether the engine is no longer configured: it finishes what it has and gets no new requests."""
        self.decisions = 0
        self.deciding_s = 0.0
        self.circuit = CircuitBreaker()
        self.can_move: Callable[[Request], bool] = lambda request: False
        """Whether another engine could serve a request that waits here. Set by the router."""
        self._clock = clock
        self._on_decided = on_decided
        self._outcomes: dict[str, asyncio.Future[QueueOutcome]] = {}
        self._answers = Answers()
        self._scheduled = self._decided = False
        self._timer: asyncio.TimerHandle | None = None
        self._timer_due_s = math.inf
        self._down_since: float | None = None if engine.state.alive else clock()
        self._probed_at = -math.inf
        self._last_curve, self._learned_at = engine.state.step_time.curve, -math.inf
        self._probe: asyncio.Task[None] | None = None
        self._prefix_events = PrefixEvents(self.admission.prefixes)
        self._closed = False

    @property
    def policy(self) -> Policy:
        """The policy that decides."""
        return self.admission.policy

    def now(self) -> float:
        """Return the time of this queue's clock (s)."""
        return self._clock()

    # --- events ---------------------------------------------------------------------------------------------------

    def submit(self, request: Request, at_once: bool = False) -> asyncio.Future[QueueOutcome]:
        """Queue ``request`` and return its future outcome. A closed queue and a full class queue answer at once.

        ``at_once``: decide about the first one now, not once for all that arrive in this turn of the event loop.
        """
        outcome: asyncio.Future[QueueOutcome] = asyncio.get_running_loop().create_future()
        if self._closed or (self.retired and self.can_move(request)):
            outcome.set_result(Reroute() if self.retired else Draining())
            return outcome
        limit = self.classes[request.slo_class].max_waiting
        if self.waiting.by_class[request.slo_class] >= limit:
            full = QueueFull(request.slo_class, limit, max(1.0, self.admission.next_admission_in_s(self._clock())))
            displaced = self.waiting.displaced_by(request)
            if displaced is None:
                self.shadows.submitted(request)
                self.shadows.rejected(request)
                outcome.set_result(full)
                return outcome
            self.shadows.rejected(displaced)
            self.admission.withdraw(displaced)
            self._resolve(displaced, full)
        self.admission.submit(request)
        # After its prefix-cache hit is predicted, which the shadows copy.
        self.shadows.submitted(request)
        self._outcomes[request.id] = outcome
        if at_once and not self._scheduled and not self._decided and len(self.waiting) == 1:
            self._decide()
            self._decided = True
            asyncio.get_running_loop().call_soon(self._end_turn)
        else:
            self.wake()
        return outcome

    def withdraw(self, request: Request) -> None:
        """Remove a waiting request: its client disconnected."""
        self.shadows.withdrawn(request)
        self._outcomes.pop(request.id, None)
        if self.admission.withdraw(request):
            self.wake()

    def on_handover(self, request: Request) -> None:
        """Note that ``request``, which was admitted, now goes to the engine."""
        if request.admitted_s is not None:
            # A request that the engine will refuse is sent on without an admission.
            note_handover(self.engine.state, self._clock() - request.admitted_s)

    def leave(self, request: Request) -> None:
        """Remove an admitted request that has ended in any way."""
        if self.admission.leave(request):
            curve = self.engine.state.step_time.curve
            if curve is not self._last_curve:
                self._last_curve, self._learned_at = curve, self._clock()
            self.shadows.left(request)
            self.wake()

    def on_alive(self, alive: bool) -> None:
        """Note that the engine came up or went down."""
        self._down_since = None if alive else self._clock()
        if not alive:
            self._prefix_events.clear()
            self.shadows.engine_lost()
        self.on_limits()

    def on_limits(self) -> None:
        """Note that the engine's limits or its KV memory may have changed."""
        if self.engine.state.alive:
            self.admission.prefixes.capacity_tokens = self.engine.state.kv_tokens or DEFAULT_CAPACITY_TOKENS
        self.admission.capacity_changed()
        self.wake()

    def has_ample_room(self, request: Request) -> bool:
        """Whether ``request`` can be queued before its length is known, and decided about before others arrive.

        No shadow policy runs, which would need the length, and `AdmissionController.has_ample_room`.
        """
        if self.shadows.all or not self.engine.state.alive:
            return False
        return self.admission.has_ample_room(self._clock(), request)

    def on_predicted_length(self, request: Request, tokens: float, p90: float) -> None:
        """Note the predicted length of a request that was queued before it."""
        request.replace_prediction(tokens, p90)
        self.waiting.reorder(request)
        self.admission.capacity_changed()
        self.wake()

    def on_first_token(self, request: Request) -> None:
        """Note that the response to ``request`` began, so its prompt is prefilled."""
        # The latest requests are the likeliest to have no first token yet.
        if self.waiting and not any(request.prefilling for request in reversed(self.running.values())):
            self.admission.schedule.on_drained()
        self.admission.on_first_token(request)
        self.wake()

    def on_cache_hit(self, request: Request, predicted: int, actual: int) -> None:
        """Note that the engine found ``actual`` prompt tokens in its prefix cache; ``predicted`` were expected."""
        self.admission.prefixes.learn(request, predicted, actual)

    def on_prefix_cache(self, events: Sequence[PrefixCacheEvent]) -> None:
        """Note what the engine's prefix cache stored and removed."""
        self._prefix_events.apply(events)
        self.wake()

    def wake(self) -> None:
        """Decide in this iteration of the event loop, once, if a decision is due."""
        if not self._scheduled and self.waiting:
            self._scheduled = True
            asyncio.get_running_loop().call_soon(self._decide)
        self.shadows.wake()

    def reroute(self, moves: Callable[[Request], bool] | None = None) -> None:
        """Answer `Reroute` to the waiting requests that another engine can serve, or that ``moves`` selects."""
        moves = moves or self.can_move
        for request in list(self.waiting):
            if moves(request):
                self._remove(request, Reroute())

    @property
    def open_requests(self) -> int:
        """Requests that wait here or that the engine serves, scheduled or not."""
        return len(self.waiting) + len(self.running) + self.calls

    def set_policy(self, policy: Policy) -> None:
        """Have ``policy`` decide from now on. Waiting requests are sorted in its order; running requests continue."""
        self.admission.set_policy(policy)
        self.wake()

    def set_shadows(self, policies: Mapping[str, Policy], changed: Collection[str]) -> None:
        """Run the shadow ``policies`` (by name). A shadow that is not ``changed`` keeps its requests and counts.

        A new one sees the requests that arrive from now on.
        """
        running = {shadow.name: shadow for shadow in self.shadows.all if shadow.name not in changed}
        self.shadows.replace([running.get(name) or self._shadow(name, policy) for name, policy in policies.items()])

    def _shadow(self, name: str, policy: Policy) -> Shadow:
        return Shadow(name, policy, self.engine.state, self.classes, self._serves_best_effort)

    def retire(self) -> None:
        """Answer `Reroute` to the waiting and to later requests that another engine can serve.

        The engine still serves the others. Called once the router no longer knows this queue.
        """
        self.retired = True
        self.reroute()

    def close(self) -> None:
        """Stop the timer, and answer `Draining` to the waiting requests and to later ones: the gateway shuts down.

        If the queue is retired, they are placed again instead.
        """
        self._closed = True
        if self._timer is not None:
            self._timer.cancel()
        self.shadows.close()
        for request in list(self.waiting):
            self._remove(request, Reroute() if self.retired else Draining())

    def back_in_s(self, now: float) -> float:
        """Return the seconds until an engine that is down is expected back, at least one, for `Retry-After`."""
        return max(1.0, self._expected_in_s(now))

    # --- the decision -----------------------------------------------------------------------------------------------

    def _decide(self) -> None:
        self._scheduled = False
        now, schedule = self._clock(), self.admission.schedule
        if not self.engine.state.alive:
            self._answer_while_down(now)
            return
        if not self.admission.decision_due(now):
            if self.waiting and schedule.due_s < self._timer_due_s:
                self._set_timer(now, schedule.due_s)
            return
        started = time.perf_counter()
        try:
            backlog_s = work_ahead_s(now, self.running.values(), self.engine.state)
            decision = self.admission.decide(now)
            self._apply(now, decision, backlog_s)
        except Exception as error:
            self._fail_all_waiting(error)
            return
        self.decisions += 1
        seconds = time.perf_counter() - started
        self.deciding_s += seconds
        self._on_decided(seconds)
        schedule.on_cost(now, seconds, self.admission.busy)
        self._set_timer(now, schedule.due_s if self.waiting else None)

    def _end_turn(self) -> None:
        self._decided = False

    def _apply(self, now: float, decision: Decision, backlog_s: float) -> None:
        """Answer the requests of ``decision``; before it, the engine would have begun with them after ``backlog_s``."""
        if decision.reject and len(self.running) == len(decision.admit) and not self.engine.state.foreign_sequences:
            self._probe_idle_engine(now)
        for request in decision.admit:
            backlog_s += self.engine.state.step_time.prefill(request.uncached_tokens)
            # Without a gate other prompts may overtake this one, so only a bound makes the prediction worth stating.
            stated = self.policy.gate != UNGATED or request.slo.ttft_s
            predicted_s = now - request.arrival_s + backlog_s if stated else None
            if self._resolve(request, Admitted(predicted_s)):
                self.shadows.admitted(request)
            else:
                # The client disconnected in this loop iteration, so the request will not run.
                self.admission.leave(request)
                self.shadows.withdrawn(request)
        for rejection in decision.reject:
            self.shadows.rejected(rejection.request)
            self._resolve(rejection.request, rejection)

    def _serves_best_effort(self, request: Request) -> bool:
        return self.classes[request.slo_class].on_unattainable == "best_effort"

    def _resolve(self, request: Request, outcome: QueueOutcome) -> bool:
        """Set the request's outcome; return False when its client has gone."""
        future = self._outcomes.pop(request.id, None)
        if future is None or future.done():
            return False
        if isinstance(outcome, Admitted):
            future.set_result(outcome)
        else:
            self._answers.give(future, outcome)
        return True

    def _remove(self, request: Request, outcome: QueueOutcome) -> None:
        self.admission.withdraw(request)
        self.shadows.withdrawn(request)
        self._resolve(request, outcome)

    def _fail_all_waiting(self, error: Exception) -> None:
        """Fail all requests without an outcome: after a bug in a policy none may wait for ever, or cause it again."""
        log.error("policy %s failed: %s", self.policy.name, type(error).__name__, exc_info=error)
        outcomes, self._outcomes = self._outcomes, {}
        for outcome in outcomes.values():
            if not outcome.done():
                outcome.set_exception(error)
        # The decision may have admitted some of them, but nothing was told so.
        for request in [*self.waiting, *(r for r in self.running.values() if r.id in outcomes)]:
            self.shadows.withdrawn(request)
            self.admission.withdraw(request)
            self.admission.leave(request)

    # --- while the engine is down, or its step times may be out of date -----------------------------------------------

    def _answer_while_down(self, now: float) -> None:
        """Reroute the waiting requests, or answer those whose deadline ends before the engine is expected back."""
        self.reroute()
        expected_in_s = self._expected_in_s(now)
        for request in list(self.waiting):
            waits_until = min(request.deadline_s, request.arrival_s + MAX_OUTAGE_WAIT_S)
            if now + expected_in_s > waits_until:
                self._remove(request, EngineDown(retry_after_s=self.back_in_s(now)))
        # The engine may come back later than expected, so check again.
        self._set_timer(now, now + min(0.5, expected_in_s) if self.waiting else None)

    def _probe_idle_engine(self, now: float) -> None:
        """Probe an idle engine that rejects: its step times may be out of date, and it serves nothing to learn from."""
        if now - max(self._probed_at, self._learned_at) >= PROBE_INTERVAL_S:
            self._probed_at = now
            self._probe = asyncio.create_task(self.engine.probe(), name=f"probe {self.engine.name}")

    def _expected_in_s(self, now: float) -> float:
        """Return the seconds until an engine that is down is expected back; one more second when it is overdue."""
        down_for = now - self._down_since if self._down_since is not None else 0.0
        left = self.engine.state.ready_in_s - down_for
        return left if left > 0 else 1.0

    def _set_timer(self, now: float, at: float | None) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        self._timer_due_s = math.inf if at is None else at
        if at is not None:
            self._timer = asyncio.get_running_loop().call_later(max(MIN_TIMER_S, at - now), self._timer_fired)

    def _timer_fired(self) -> None:
        self._timer, self._timer_due_s = None, math.inf
        self.wake()
