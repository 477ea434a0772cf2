"""Chooses the engine for a request that is not scheduled, and another one if that engine fails it."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from functools import partial

from engine_adapter.engine import EngineLost, EngineUnreachable, Send
from gateway.api.auth import ApiKey
from gateway.api.body_fields import FieldGuard
from gateway.api.errors import ApiError
from gateway.api.failover import Failure, HeldResponse, failure_of, holding, may_fail_over
from gateway.api.http_request import HttpRequest
from gateway.api.models import body_with_model, member_of_body, model_in_body, model_not_found
from gateway.api.pass_through import PassThrough
from gateway.api.stored_responses import RESPONSES_PATH, noting_id, response_id_in_path
from gateway.observability.metrics import Metrics
from gateway.scheduling.engine_queue import EngineQueue
from gateway.scheduling.retry_budget import RetryBudget
from gateway.scheduling.router import Router, UnknownModel

_NOT_STARTED = frozenset(("unreachable", "http_429", "http_503"))
"""Failures after which a request can be sent again, whatever it does: the engine has not begun it."""


class NoEngineAlive(Exception):  # noqa: N818 - named after its cause
    """No engine that could answer is alive; the first is expected back in ``retry_after_s`` seconds."""

    def __init__(self, retry_after_s: float) -> None:
        super().__init__()
        self.retry_after_s = retry_after_s


class EngineFailed(Exception):  # noqa: N818 - as above
    """The engine of ``engine_queue`` died while it answered."""

    def __init__(self, engine_queue: EngineQueue) -> None:
        super().__init__()
        self.engine_queue = engine_queue


@dataclass(slots=True)
class _Target:
    """What decides which engine can serve a request: its model, or the stored response that it is about."""

    model: str
    owner: str
    moves_on_404: bool
    repeatable: bool
    tried: set[str] = field(default_factory=set)


@dataclass(slots=True)
class Unscheduled:
    """Sends requests past the queues.

    A request that names a model goes to an engine that serves it; one about a stored response to the engine that has
    it; any other to the first engine that is alive.
    """

    router: Router
    pass_through: PassThrough
    retries: RetryBudget
    metrics: Metrics

    async def serve(self, http: HttpRequest, body: bytes, key: ApiKey, guard: FieldGuard) -> None:
        """Have an engine answer the request. ``guard`` applies the rights of ``key``.

        Raises:
            ApiError: 404 for an unknown model, or what `PassThrough.serve` raises.
            NoEngineAlive: no engine that could answer is alive.
            EngineFailed: the engine died, and no other one can answer.
        """
        target = self._target(http, body)
        self.retries.on_request(time.monotonic())
        while True:
            queue = self._choose(target)
            if queue is None:
                raise NoEngineAlive(self._back_in_s(target))
            target.tried.add(queue.engine.name)
            held = HeldResponse(
                partial(may_fail_over, moves_on_404=target.moves_on_404), lambda: self._choose(target) is not None
            )
            send = self._sender(http, queue, target, held)
            own = queue.engine.state.own_name(target.model)
            content = body if own in (None, target.model) else body_with_model(http.headers, body, own or "")
            error = await self._call(http, content, queue, send, key, guard)
            failure = None if http.response_started else failure_of(error, held)
            if failure is not None and self._has_retry(target, failure):
                self.metrics.failovers.labels(queue.engine.name, failure.reason).inc()
                continue
            if error is not None:
                raise EngineFailed(queue) from error
            await _release(http, held)
            return

    def _target(self, http: HttpRequest, body: bytes) -> _Target:
        path, is_read = http.scope["path"], http.scope["method"] in ("GET", "HEAD")
        stored = response_id_in_path(path)
        model = "" if is_read else model_in_body(http.headers, body)
        if path == RESPONSES_PATH:
            previous = member_of_body(http.headers, body, "previous_response_id")
            return _Target(model, self.router.owner_of(previous), False, repeatable=True)
        owner = self.router.owner_of(stored)
        return _Target(model, owner, bool(stored and not owner), repeatable=is_read or model != "")

    def _sender(self, http: HttpRequest, queue: EngineQueue, target: _Target, held: HeldResponse) -> Send:
        send: Send = http.send
        if http.scope["path"] == RESPONSES_PATH:
            send = noting_id(send, partial(self.router.remember_owner, engine_name=queue.engine.name))
        return holding(send, held)

    async def _call(
        self, http: HttpRequest, body: bytes, queue: EngineQueue, send: Send, key: ApiKey, guard: FieldGuard
    ) -> EngineLost | None:
        """Have the engine answer through ``send``. Return the error if it died."""
        sent_at = time.monotonic()
        queue.calls += 1
        try:
            await self.pass_through.serve(http, body, queue.engine, send, key, guard)
        except EngineLost as error:
            reason = "unreachable" if isinstance(error, EngineUnreachable) else "lost"
            self.router.on_failure(queue, reason, sent_at, begun=http.response_started)
            return error
        finally:
            queue.calls -= 1
        return None

    def _choose(self, target: _Target) -> EngineQueue | None:
        try:
            return self.router.choose(target.model, target.owner, target.tried)
        except UnknownModel:
            raise model_not_found(target.model) from None

    def _has_retry(self, target: _Target, failure: Failure) -> bool:
        """Whether the request may be sent to another engine, and take the retry from the budget."""
        may_repeat = target.repeatable or failure.reason in _NOT_STARTED
        if not may_repeat or self._choose(target) is None:
            return False
        return failure.unsent or self.retries.spend(time.monotonic())

    def _back_in_s(self, target: _Target) -> float:
        pool = self.router.pool(target.model) if target.model else self.router.engine_queues
        return min(queue.back_in_s(time.monotonic()) for queue in pool)


async def _release(http: HttpRequest, held: HeldResponse) -> None:
    """Send the client the response that was held, if any."""
    messages = held.release()
    if isinstance(messages, ApiError):
        raise messages
    for message in messages:
        await http.send(message)
