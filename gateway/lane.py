"""One engine's lane: its class queues, its running set, its policy instance.

Nothing in a lane knows that other engines exist. Decisions are made on the event loop, coalesced: however many events
fall into one turn of the loop, the policy decides once.
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from engine_adapter.engine import Engine
from gateway.policies.base import Decision, Policy, Rejection, prefill_backlog
from gateway.request import Request
from gateway.slo import SloClass

log = logging.getLogger("antares.lane")

Clock = Callable[[], float]

PROBE_EVERY_S = 10.0
"""At most so often an idle engine that has requests refused is probed."""


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

    lane: Lane
    predicted_ttft_s: float | None


@dataclass(slots=True, frozen=True)
class Displaced:
    """This lane's engine is down, but another's is not: place the request again."""


Verdict = Displaced | Admitted | Rejection | EngineDown | QueueFull


@dataclass(slots=True, eq=False)
class _Waiting:
    request: Request
    verdict: asyncio.Future[Verdict]


@dataclass(slots=True, eq=False)
class Lane:
    """Queues in front of one engine. ``unbounded_wait_s``: how long to wait for a dead one without a TTFT bound."""

    engine: Engine
    policy: Policy
    classes: dict[str, SloClass]
    clock: Clock = time.monotonic
    unbounded_wait_s: float = 120.0
    on_decided: Callable[[float], None] = lambda seconds: None
    another_lives: Callable[[], bool] = lambda: False
    queues: dict[str, dict[str, _Waiting]] = field(default_factory=dict)
    running: dict[str, Request] = field(default_factory=dict)
    decisions: int = 0
    deciding_s: float = 0.0
    _scheduled: bool = False
    _timer: asyncio.TimerHandle | None = None
    _down_since: float | None = None
    _probed_at: float = -math.inf
    _probe: asyncio.Task[None] | None = None

    def __post_init__(self) -> None:
        self.queues = {name: {} for name in self.classes}

    # --- events ---------------------------------------------------------------------------------------------------

    def submit(self, request: Request) -> asyncio.Future[Verdict]:
        """Queue ``request``; the future tells what was decided. A full class queue answers at once."""
        verdict: asyncio.Future[Verdict] = asyncio.get_running_loop().create_future()
        queue = self.queues[request.slo_class]
        limit = self.classes[request.slo_class].max_waiting
        if len(queue) >= limit:
            verdict.set_result(QueueFull(limit, retry_after_s=self._drain_estimate()))
            return verdict
        queue[request.id] = _Waiting(request, verdict)
        self.wake()
        return verdict

    def withdraw(self, request: Request) -> None:
        """The client left while its request waited."""
        self.queues[request.slo_class].pop(request.id, None)
        self.wake()

    def leave(self, request: Request) -> None:
        """An admitted request is through with the engine, however it ended."""
        if self.running.pop(request.id, None) is not None:
            self.wake()

    def on_alive(self, alive: bool) -> None:
        """The engine came up or went down."""
        self._down_since = None if alive else self.clock()
        self.wake()

    def wake(self) -> None:
        """Something changed: decide in this turn of the event loop, once."""
        if not self._scheduled and any(self.queues.values()):
            self._scheduled = True
            asyncio.get_running_loop().call_soon(self._decide)

    def close(self) -> None:
        """The gateway shuts down: stop the timer, turn away what still waits."""
        if self._timer is not None:
            self._timer.cancel()
        for request in self.waiting:
            self._resolve(request, EngineDown(retry_after_s=5.0))

    # --- the decision -----------------------------------------------------------------------------------------------

    @property
    def waiting(self) -> list[Request]:
        """All that wait, over the classes."""
        return [w.request for queue in self.queues.values() for w in queue.values()]

    def _decide(self) -> None:
        self._scheduled = False
        now = self.clock()
        if not self.engine.state.alive:
            self._turn_away_what_cannot_wait(now)
            return
        started = time.perf_counter()
        try:
            decision = self.policy.decide(now, self.waiting, self.running.values(), self.engine.state)
            self._apply(now, decision)
        except Exception as error:
            self._fail_all_waiting(error)
            return
        self.decisions += 1
        spent = time.perf_counter() - started
        self.deciding_s += spent
        self.on_decided(spent)
        self._set_timer(now, decision.recheck_at)

    def _apply(self, now: float, decision: Decision) -> None:
        backlog = prefill_backlog(self.running.values(), self.engine.state)
        for request in decision.admit:
            backlog += self.engine.state.step_time.prefill(request.prompt_tokens)
            predicted = now - request.arrival_s + backlog if self.policy.gated or request.slo.ttft_s else None
            self._admit(now, request, predicted)
        if decision.reject and not self.running:
            self._doubt(now)
        for rejection in decision.reject:
            request = rejection.request
            if self.classes[request.slo_class].on_unattainable == "best_effort" and not request.best_effort:
                request.best_effort = True
                self.wake()
                continue
            self._resolve(request, rejection)

    def _admit(self, now: float, request: Request, predicted_ttft_s: float | None) -> None:
        request.admitted_s = now
        self.running[request.id] = request
        if not self._resolve(request, Admitted(self, predicted_ttft_s)):
            # The client left in this very turn: nobody will run the request, so it must not count as running.
            self.running.pop(request.id, None)

    def _resolve(self, request: Request, verdict: Verdict) -> bool:
        waiting = self.queues[request.slo_class].pop(request.id, None)
        if waiting is None or waiting.verdict.done():
            return False
        waiting.verdict.set_result(verdict)
        return True

    def _fail_all_waiting(self, error: Exception) -> None:
        """A bug in a policy must not keep requests waiting for ever, nor the one that brought it out fail the next."""
        log.error("policy %s failed: %s", self.policy.name, type(error).__name__, exc_info=error)
        for queue in self.queues.values():
            for waiting in queue.values():
                if not waiting.verdict.done():
                    waiting.verdict.set_exception(error)
            queue.clear()

    def _turn_away_what_cannot_wait(self, now: float) -> None:
        if self.another_lives():
            for request in self.waiting:
                self._resolve(request, Displaced())
            return
        back_in = self.back_in_s(now)
        for request in self.waiting:
            patience = min(request.deadline_s, request.arrival_s + self.unbounded_wait_s)
            if now + back_in > patience:
                self._resolve(request, EngineDown(retry_after_s=back_in))
        # The expected time of return may slip: look again.
        self._set_timer(now, now + 0.5 if any(self.queues.values()) else None)

    def _doubt(self, now: float) -> None:
        """An idle engine refuses: its step times may be out of date, and nothing it serves will correct them."""
        if now - self._probed_at >= PROBE_EVERY_S:
            self._probed_at = now
            self._probe = asyncio.create_task(self.engine.probe(), name=f"probe {self.engine.name}")

    def back_in_s(self, now: float) -> float:
        """Seconds until a dead engine is expected back, at least one."""
        down_for = now - self._down_since if self._down_since is not None else 0.0
        return max(1.0, self.engine.state.ready_in_s - down_for)

    def _drain_estimate(self) -> float:
        """Seconds of prefill work that wait and run: a queue with a place free is at least that far away."""
        times = self.engine.state.step_time
        work: Iterable[Request] = self.waiting
        return max(1.0, sum(times.prefill(r.prompt_tokens) for r in work))

    def _set_timer(self, now: float, at: float | None) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if at is not None:
            delay = max(0.001, at - now)
            self._timer = asyncio.get_running_loop().call_later(delay, self.wake)
