"""Decides after each attempt to serve a scheduled request how its engine did, and whether another engine is tried."""

from __future__ import annotations

import time
from dataclasses import dataclass

from gateway.api.call import Call
from gateway.api.failover import Failure, HangWatch, failure_of
from gateway.api.response_relay import ResponseRelay
from gateway.observability.ledger import Entry
from gateway.observability.metrics import Metrics
from gateway.scheduling.engine_queue import EngineQueue
from gateway.scheduling.retry_budget import RetryBudget
from gateway.scheduling.router import Router

MAX_TRIES = 3
"""Attempts to send a request to an engine, if each engine is unreachable before it takes the request. Convention."""


@dataclass(slots=True)
class Failover:
    """Tells the router how each attempt went, and decides about another one.

    ``first_token_timeout_s``: shortest time without a token after which an engine may count as hung; None: never.
    """

    router: Router
    budget: RetryBudget
    metrics: Metrics
    first_token_timeout_s: float | None

    def hang_watch(
        self, call: Call, engine_queue: EngineQueue, relay: ResponseRelay, sent_at: float
    ) -> HangWatch | None:
        """Return what notices that the engine hangs; None if no other engine could serve the request instead."""
        request, timeout_s = call.request, self.first_token_timeout_s
        if timeout_s is None or len(self.router.engine_queues) == 1:
            return None

        def can_move() -> bool:
            return not relay.started and engine_queue.can_move(request) and self._denial(call, engine_queue) == ""

        return HangWatch(request, engine_queue.running, engine_queue.engine.state, timeout_s, sent_at, can_move)

    def on_first_token(self, call: Call, engine_queue: EngineQueue, sent_at: float) -> None:
        """Note that the engine serves the request. Engines that failed it before are to blame for that."""
        engine_queue.on_first_token(call.request)
        self.router.on_success(engine_queue, sent_at)
        for suspect, reason, tried_at in call.suspects:
            self.router.on_failure(suspect, reason, tried_at)
        call.suspects.clear()

    async def fails_over(
        self,
        call: Call,
        entry: Entry,
        engine_queue: EngineQueue,
        relay: ResponseRelay,
        error: BaseException | None,
        sent_at: float,
    ) -> bool:
        """Note how the engine did, and return whether the request is to be queued again for another one.

        If not, the error response that was held back is sent.
        """
        request, router = call.request, self.router
        failure = None if relay.complete and relay.held.error is None else failure_of(error, relay.held)
        if failure is None:
            if relay.failed_in_stream and not relay.refused_in_stream:
                router.on_failure(engine_queue, "cut", sent_at, begun=True)
            elif relay.complete and relay.status < 400:
                router.on_completed(engine_queue)
            return False
        entry.attempts[-1].stop(failure.reason, time.monotonic())
        if relay.started and relay.held.error is None:
            router.on_failure(engine_queue, "cut", sent_at, begun=True)
            return False
        if failure.blameless:
            router.suspect(engine_queue)
            call.suspects.append((engine_queue, failure.reason, sent_at))
        else:
            router.on_failure(engine_queue, failure.reason, sent_at, failure.retry_after_s)
        if not relay.started and self._has_retry(call, engine_queue, failure):
            request.failed_on = (*request.failed_on, engine_queue.engine.name)
            self.metrics.failovers.labels(engine_queue.engine.name, failure.reason).inc()
            # Before its bounds and lengths change, which the sums over the engine's requests have.
            engine_queue.leave(request)
            request.wait_again()
            return True
        if error is None:
            await relay.release()
        return False

    def _has_retry(self, call: Call, engine_queue: EngineQueue, failure: Failure) -> bool:
        """Whether the request may be queued again, and take the retry from the budget."""
        if failure.unsent:
            # It costs no engine any work, and the same engine may be up again.
            call.unsent += 1
            return call.unsent < max(MAX_TRIES, len(self.router.engine_queues))
        if not self.has_others(call, engine_queue):
            return False
        denial = self._denial(call, engine_queue)
        if denial:
            self.metrics.failovers_denied.labels(denial).inc()
            return False
        return self.budget.spend(time.monotonic())

    def has_others(self, call: Call, engine_queue: EngineQueue) -> bool:
        """Whether a live engine other than that of ``engine_queue`` serves the model and has not failed the request."""
        return any(queue is not engine_queue for queue in self.router.others(call.request))

    def _denial(self, call: Call, engine_queue: EngineQueue) -> str:
        """Return why the request may not go to another engine: ``deadline`` or ``budget``; "" if it may."""
        request, now = call.request, time.monotonic()
        waives = engine_queue.classes[request.slo_class].on_unattainable == "best_effort"
        if now > request.deadline_s and not waives:
            return "deadline"
        return "" if self.budget.available(now) else "budget"
