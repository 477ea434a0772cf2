"""The ASGI app for ``/v1/*``: one pipeline that takes each request from its first byte to its outcome.

    authenticate -> parse the body -> read the SLO -> estimate the prompt size -> place on an engine
      -> that engine's checks and limits -> predict the length -> EngineQueue and policy -> encode the body
      -> engine -> ResponseRelay -> ledger

`Proxy._authenticate`, `_receive_body` and `_read` run up to the prompt size, and parse the body once. `Scheduled` runs
the rest. Requests of routes that generate no text go to `Unscheduled`.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import time
from dataclasses import dataclass
from os import urandom
from typing import Any

from engine_adapter.asgi import ClientDisconnected
from engine_adapter.engine import (
    Receive,
    Scope,
    Send,
)
from gateway.api.auth import ApiKey, KeyRing
from gateway.api.body_fields import FieldGuard
from gateway.api.body_memory import BodyMemory, BodyReservation
from gateway.api.call import Call
from gateway.api.engine_call import ClientStalled
from gateway.api.errors import ApiError, bad_request, draining, engine_removed, loading, unavailable
from gateway.api.failover_decisions import Failover
from gateway.api.http_request import HttpRequest
from gateway.api.keep_alive import KeepAlive
from gateway.api.limits import Limits
from gateway.api.models import (
    asks_for_models,
    check_model,
    model_not_found,
    permitted_body,
    requested_model,
    send_models,
)
from gateway.api.open_requests import OpenRequests
from gateway.api.pass_through import PassThrough
from gateway.api.paths import check_path
from gateway.api.prompt_size import PromptSize
from gateway.api.rejections import queue_full
from gateway.api.request_body import (
    parse_document,
    read_limited_body,
)
from gateway.api.request_records import asks_for_records, send_records
from gateway.api.response_relay import LAST_WORDS_S, send_error
from gateway.api.routes.generation import GenerationRoute
from gateway.api.routes.table import RouteTable
from gateway.api.scheduled import LEAVE_GRACE_S, Scheduled
from gateway.api.sharers import sharer_of
from gateway.api.slo_headers import read_output_tokens, read_slo
from gateway.api.start_queue import ARRIVED_KEY
from gateway.api.tenants import TenantAccounts
from gateway.api.unscheduled import EngineFailed, NoEngineAlive, Unscheduled
from gateway.observability.ledger import Ledger
from gateway.observability.metrics import Metrics
from gateway.observability.recorder import Recorder
from gateway.prediction.client import LengthPredictor
from gateway.requests.request import Request
from gateway.requests.slo import SloClass
from gateway.scheduling.engine_queue import EngineQueue
from gateway.scheduling.retry_budget import RetryBudget
from gateway.scheduling.router import Router, UnknownModel

log = logging.getLogger("antares.proxy")

MAX_HEADERS = 128
"""Limit on the header lines of a request."""

_NOTHING = contextlib.nullcontext()
"""In place of `KeepAlive` for a request without it."""


@dataclass(frozen=True, slots=True)
class ProxySettings:
    """The settings of `Proxy` that may change while it serves.

    ``first_token_timeout_s`` is that of `Failover`, ``keep_alive_s`` the interval of `KeepAlive`; None: neither.
    """

    max_body_bytes: int
    max_open_requests: int
    max_pass_through: int
    first_token_timeout_s: float | None
    keep_alive_s: float | None
    routes: RouteTable
    limits: Limits


class Proxy:
    """Schedules the requests of generation routes, and passes those of other known routes on to an engine.

    ``draining``: every new request is answered with 503. ``stopping``: the engines stop, so a request that loses its
    engine is answered likewise. ``loading``: the gateway starts, so requests are answered with 503 until an engine is
    up. ``in_flight``: requests that have no complete response yet.
    ``classes``, ``keys`` and ``guard`` may be replaced while requests are served, and `set_settings` may be called;
    each request keeps what it was judged with.
    """

    def __init__(
        self,
        router: Router,
        classes: dict[str, SloClass],
        keys: KeyRing,
        predictor: LengthPredictor,
        ledger: Ledger,
        metrics: Metrics,
        retries: RetryBudget,
        guard: FieldGuard,
        recorder: Recorder,
        settings: ProxySettings,
    ) -> None:
        self.draining = self.stopping = self.loading = False
        self._tasks: set[asyncio.Task[Any]] = set()
        self.in_flight = 0
        self._router = router
        self.classes = classes
        self.keys = keys
        self.guard = guard
        self._metrics = metrics
        self.recorder = recorder
        self._settings, stall_s = settings, settings.limits.stall_s
        self.open_requests = OpenRequests(settings.max_open_requests)
        self.bodies = BodyMemory(settings.limits.body_memory_bytes)
        self._passing = PassThrough(settings.max_pass_through, stall_s, metrics.pass_through)
        self._unscheduled = Unscheduled(router, self._passing, retries, metrics)
        self.accounts = TenantAccounts(metrics.usage)
        self._failover = Failover(router, retries, metrics, settings.first_token_timeout_s)
        self._scheduled = Scheduled(
            router, predictor, ledger, recorder, metrics, self._failover, self.accounts, stall_s, self._engine_lost
        )
        self.sizer = self._scheduled.sizer

    def set_settings(self, settings: ProxySettings) -> None:
        """Apply ``settings`` to later requests."""
        self._settings, stall_s = settings, settings.limits.stall_s
        self.open_requests.limit = settings.max_open_requests
        self.bodies.shared.limit = settings.limits.body_memory_bytes
        self._passing.set_limits(settings.max_pass_through, stall_s)
        self._failover.first_token_timeout_s, self._scheduled.stall_s = settings.first_token_timeout_s, stall_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        arrived_s = scope.get(ARRIVED_KEY) or time.monotonic()
        http = HttpRequest(scope, receive, send, arrived_s, self._settings.routes.find(scope["path"]))
        task = asyncio.current_task()
        assert task is not None
        self.in_flight += 1
        self._tasks.add(task)
        try:
            await self._answer(http)
        finally:
            self.in_flight -= 1
            self._tasks.discard(task)
            self.accounts.leave(http)
            self._metrics.on_response(http.route.label, http.status)
            self._record(http)

    async def _answer(self, http: HttpRequest) -> None:
        """Serve ``http``, and answer with an error response if that fails."""
        try:
            key = self._authenticate(http)
            http.tenant = key.tenant
            http.belongs_to(sharer_of(http.scope, key, self.keys))
            self.accounts.enter(http, key)
            with self.bodies.reservation(http.sharer) as memory:
                # NOTE: no local variable for the body here. It would keep up to `max_body_bytes` for each open request.
                if http.route.generation is not None:
                    call = self._read(http, key, http.route.generation, await self._receive_body(http, memory))
                    with self._keep_alive(call):
                        # NOTE: before the prompt is measured, which takes an engine's tokenizer.
                        slo_class = call.request.slo_class if len(self.classes) > 1 else ""
                        if not self.open_requests.enter(http.sharer, slo_class):
                            raise self._scheduled.reject(call, *self._too_many_open(http))
                        try:
                            await self._scheduled.serve(call)
                        finally:
                            self.open_requests.leave(http.sharer, slo_class)
                else:
                    await self._pass_through(http, key, await self._receive_body(http, memory))
        except ApiError as error:
            await _end_with(http, error)
        except ClientDisconnected as error:
            http.status = 499
            if isinstance(error, ClientStalled):
                http.cut("slow_reader")
        except asyncio.CancelledError:
            if not self.stopping:
                raise
            await _end_with(http, draining())
        except Exception as error:
            # NOTE: an exception's text may quote the request, so only its type is logged above debug level.
            debugging = log.isEnabledFor(logging.DEBUG)
            log.error("a request failed inside the gateway: %s", type(error).__name__, exc_info=debugging)
            if not http.response_started:
                internal = ApiError(500, "The gateway failed on this request.", "internal_error", "internal_error")
                await send_error(http.send, internal, http.request_id, http.route.errors)

    def _record(self, http: HttpRequest) -> None:
        if http.entry is not None:
            self.recorder.ended(http.entry, http.status)
        elif self.recorder.unscheduled is not None:
            self.recorder.ended_unscheduled(
                http.request_id.decode(), http.tenant, http.route.label, http.status, http.arrival_s,
                http.headers.get("traceparent"),
            )  # fmt: skip

    async def cut(self) -> None:
        """Answer the requests that are still open although the engines have stopped, such as one without its body."""
        tasks = self._tasks - {asyncio.current_task()}
        if not tasks:
            return
        # What ran on an engine ends by itself.
        _, unfinished = await asyncio.wait(tasks, timeout=LEAVE_GRACE_S)
        for task in unfinished:
            task.cancel()
        if unfinished:
            await asyncio.wait(unfinished, timeout=LAST_WORDS_S)

    # --- the pipeline, in order ---------------------------------------------------------------------------------------

    def _authenticate(self, http: HttpRequest) -> ApiKey:
        """Return the request's API key.

        Raises `ApiError` 404, 405 or 501 for its route, 401, 431 for too many headers, or 503 while draining.
        """
        if len(http.headers.raw) > MAX_HEADERS:
            raise bad_request(f"More than {MAX_HEADERS} headers.", None, "too_many_headers", 431)
        check_path(http.scope)
        http.route.check(http.scope["method"], http.scope["path"])
        key = self.keys.authenticate(http.headers.get("authorization"), http.headers.get("x-api-key"))
        if self.draining:
            raise draining()
        if self.loading and not self._router.alive:
            raise loading(min(queue.back_in_s(time.monotonic()) for queue in self._router.engine_queues))
        return key

    async def _receive_body(self, http: HttpRequest, memory: BodyReservation) -> bytes:
        most, limits = self._settings.max_body_bytes, self._settings.limits
        try:
            return await read_limited_body(http.headers, http.receive, most, memory, limits, http.arrived_body)
        except ApiError:
            http.give_up_body()
            raise

    def _read(self, http: HttpRequest, key: ApiKey, route: GenerationRoute, body: bytes) -> Call:
        """Parse the body, read the SLO, estimate the prompt size. Nothing here depends on an engine."""
        received_s = time.monotonic()
        document = parse_document(body)
        output_tokens = read_output_tokens(http.headers, document)
        self.guard.apply(document, key)
        model, pool = self._model_of(document, key)
        previous = document.get("previous_response_id")
        slo_class, slo = read_slo(http.headers, key, self.classes)
        prompt = route.read_prompt(document)
        request = Request(
            id=urandom(16).hex(),
            slo_class=slo_class.name,
            arrival_s=http.arrival_s,
            slo=slo,
            prompt_tokens=1,
            predicted_tokens=1.0,
            sequences=prompt.sequences,
            tenant=key.tenant,
            weight=key.weight,
            max_tokens=math.inf if prompt.max_tokens is None else prompt.max_tokens,
            requested_model=model,
            pinned_to=self._router.owner_of(previous) if isinstance(previous, str) else "",
        )
        # To choose among engines, the router must know the prompt. A single one measures it itself.
        size, state = PromptSize(), pool[0].engine.state
        request.model = state.own_name(model) or state.model
        if len(pool) > 1:
            size = self.sizer.estimate(request, prompt, document, state)
        return Call(http, route, document, prompt, request, size, output_tokens, received_s=received_s)

    def _keep_alive(self, call: Call) -> contextlib.AbstractContextManager[object]:
        """Return what keeps the connection of a stream alive until its answer begins; nothing by default."""
        if self._settings.keep_alive_s is None or call.document.get("stream") is not True:
            return _NOTHING
        return KeepAlive(call.http, self._settings.keep_alive_s)

    def _model_of(self, document: dict[str, Any], key: ApiKey) -> tuple[str, list[EngineQueue]]:
        """Return the model that the request names, or the default, and its pool. Raises `ApiError` 404 without one."""
        model = requested_model(document) or self._router.default_model
        check_model(model, key, self._router)
        try:
            return model, self._router.pool(model)
        except UnknownModel:
            raise model_not_found(model) from None

    # --- other routes, and errors -------------------------------------------------------------------------------------

    async def _pass_through(self, http: HttpRequest, key: ApiKey, body: bytes) -> None:
        """Answer a request that is not scheduled."""
        if asks_for_models(http):
            await send_models(http, self._router, key)
            return
        if asks_for_records(http):
            await send_records(http, self.recorder.decisions, key)
            return
        if not self.open_requests.try_take(http.sharer):
            raise self._too_many_open(http)[1]
        try:
            body = permitted_body(http, body, key, self._router)
            await self._unscheduled.serve(http, body, key, self.guard)
        except NoEngineAlive as error:
            if self.stopping:
                raise draining() from error
            raise unavailable("No engine is alive.", "engine_unavailable", error.retry_after_s) from error
        except EngineFailed as failed:
            answer = self._engine_lost(failed.engine_queue)
            if http.response_started:
                http.status = answer.status
                if not http.streaming:
                    # A partial document cannot be repaired. The server closes its connection, so the client notices.
                    return
            raise answer from failed
        finally:
            self.open_requests.free(http.sharer)

    def _too_many_open(self, http: HttpRequest) -> tuple[str, ApiError]:
        """Return the reason and the response for a request beyond the limit on open requests."""
        now, limit = time.monotonic(), self.open_requests.limit
        ends = [queue.admission.first_end_in_s(now) for queue in self._router.engine_queues if queue.running]
        of_tenant = self.open_requests.has_room()
        whose = "This SLO class of the tenant" if self.open_requests.fits(http.sharer) else "This tenant"
        whose = whose if of_tenant else "The gateway"
        message = f"{whose} has too many open requests (server.max_open_requests)."
        error = queue_full(message, limit, max(1.0, min(ends, default=1.0)))
        return "tenant_full" if of_tenant else "gateway_full", error

    def _engine_lost(self, engine_queue: EngineQueue) -> ApiError:
        if self.stopping:
            return draining()
        if engine_queue.retired:
            return engine_removed()
        retry_after_s = engine_queue.back_in_s(time.monotonic())
        return unavailable("The engine died while it served this request. Send it again.", "engine_lost", retry_after_s)


async def _end_with(http: HttpRequest, error: ApiError) -> None:
    """Answer with ``error``, or make it the last event of a stream that has begun."""
    if not http.response_started:
        await send_error(http.send, error, http.request_id, http.route.errors)
    elif http.streaming:
        # A server raises if the stream has ended already.
        with contextlib.suppress(RuntimeError, TimeoutError):
            async with asyncio.timeout(LAST_WORDS_S):
                # The engine may have died within an event, which a blank line ends.
                event = b"\n\n" + http.route.errors.event(error, http.request_id, 0)
                await http.send({"type": "http.response.body", "body": event})
