"""The ASGI app for ``/v1/*``: one pipeline that takes each scheduled request from its first byte to its outcome.

    authenticate -> parse the body -> read the SLO -> estimate the prompt size -> place on an engine
      -> that engine's checks and limits -> predict the length -> EngineQueue and policy -> encode the body
      -> engine -> ResponseRelay -> ledger

`Proxy._authenticate`, `_receive_body` and `_read` run up to the prompt size. `_schedule` runs the rest: `_place`,
`_predict` and `_serve`. `_serve` calls `_admit` (place again and wait) and `_forward` (encode, engine,
response). `_conclude` or `_fail` closes the ledger entry. The body is parsed once and encoded once.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from engine_adapter.asgi import BODY_KEY, BodyTooDeep, ClientConnection, ClientDisconnected, JsonBody
from engine_adapter.engine import (
    OBSERVER_KEY,
    RENDERING_KEY,
    XARGS_KEY,
    Engine,
    EngineLost,
    Receive,
    Scope,
    Send,
)
from gateway.api.auth import ApiKey, KeyRing
from gateway.api.body_fields import FieldGuard
from gateway.api.body_memory import BodyMemory, BodyReservation
from gateway.api.engine_call import ClientStalled, call_engine
from gateway.api.errors import ApiError, bad_request, draining, engine_removed, loading, unavailable
from gateway.api.failover import Failure, HangWatch, HeldResponse, failure_of, may_fail_over
from gateway.api.http_request import HttpRequest
from gateway.api.keep_alive import KeepAlive
from gateway.api.limits import Limits
from gateway.api.models import (
    asks_for_models,
    check_body_model,
    check_model,
    for_engine,
    model_not_found,
    requested_model,
    send_models,
)
from gateway.api.pass_through import PassThrough
from gateway.api.paths import check_path
from gateway.api.prompt import Prompt
from gateway.api.prompt_size import PromptSize, PromptSizer
from gateway.api.rejections import answer_to, queue_full
from gateway.api.request_body import (
    check_with_engine,
    document_for_engine,
    engine_scope,
    gate_xargs,
    parse_document,
    read_limited_body,
    too_deep,
)
from gateway.api.request_records import asks_for_records, send_records
from gateway.api.response_relay import LAST_WORDS_S, ResponseRelay, send_error
from gateway.api.routes.generation import GenerationRoute
from gateway.api.routes.table import RouteTable
from gateway.api.slo_headers import read_output_tokens, read_slo
from gateway.api.slo_report import REPORT_HEADER
from gateway.api.stored_responses import RESPONSES_PATH, noting_id
from gateway.api.unscheduled import EngineFailed, NoEngineAlive, Unscheduled
from gateway.observability.ledger import Attempt, Entry, Ledger, Outcome
from gateway.observability.metrics import Metrics
from gateway.observability.recorder import Recorder
from gateway.observability.trace_context import with_traceparent
from gateway.policies.base import UNGATED
from gateway.prediction.client import LengthPredictor
from gateway.requests.progress import Progress
from gateway.requests.request import Request
from gateway.requests.slo import SloClass
from gateway.scheduling.engine_queue import Admitted, EngineQueue, QueueOutcome, Reroute
from gateway.scheduling.retry_budget import RetryBudget
from gateway.scheduling.router import Router, UnknownModel

log = logging.getLogger("antares.proxy")

MAX_HEADERS = 128
"""Limit on the header lines of a request."""

MAX_TRIES = 3
"""Attempts to send a request to an engine, if each engine is unreachable before it takes the request. Convention."""

LEAVE_GRACE_S = 1.0
"""Seconds that an engine's app has to return after the client disconnected. Then it is cancelled. Convention."""


@dataclass(slots=True, eq=False)
class Call:
    """A scheduled request on its way through the pipeline.

    ``engine``: the last one that it was judged with. ``output_tokens``: the length that the client expects.
    ``unsent``: attempts in which an engine was unreachable. ``received_s``: when the body was complete. ``suspects``:
    engines that are to blame if another engine serves the request, with reason and time of the attempt.
    """

    http: HttpRequest
    route: GenerationRoute
    document: dict[str, Any]
    prompt: Prompt
    request: Request
    size: PromptSize
    output_tokens: int | None = None
    engine: Engine | None = None
    unsent: int = 0
    received_s: float | None = None
    suspects: list[tuple[EngineQueue, str, float]] = field(default_factory=list)


class Proxy:
    """Schedules the requests of generation routes, and passes those of other known routes on to an engine.

    ``draining``: every new request is answered with 503. ``stopping``: the engines stop, so a request that loses its
    engine is answered likewise. ``loading``: the gateway starts, so requests are answered with 503 until an engine is
    up. ``in_flight``: requests that have no complete response yet.
    ``classes``, ``keys`` and ``guard`` may be replaced while requests are served, and `set_limits` may be called; each
    request keeps what it was judged with.
    """

    def __init__(
        self,
        router: Router,
        classes: dict[str, SloClass],
        keys: KeyRing,
        predictor: LengthPredictor,
        ledger: Ledger,
        metrics: Metrics,
        *,
        max_body_bytes: int = 8 << 20,
        max_open_requests: int = 4096,
        retries: RetryBudget | None = None,
        first_token_timeout_s: float | None = 20.0,
        max_pass_through: int = 32,
        routes: RouteTable | None = None,
        keep_alive_s: float | None = None,
        guard: FieldGuard | None = None,
        recorder: Recorder | None = None,
        limits: Limits | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.draining = self.stopping = self.loading = False
        self._tasks: set[asyncio.Task[Any]] = set()
        self.in_flight = 0
        self._router = router
        self.classes = classes
        self.keys = keys
        self._predictor = predictor
        self._ledger = ledger
        self._metrics = metrics
        self._max_body_bytes = max_body_bytes
        self._max_open_requests = max_open_requests
        self._retries = retries or RetryBudget()
        self._first_token_timeout_s = first_token_timeout_s
        self._limits = limits or Limits()
        self.bodies = BodyMemory(self._limits.body_memory_bytes)
        self._passing = PassThrough(max_pass_through, self._limits.stall_s, metrics.pass_through)
        self._unscheduled = Unscheduled(router, self._passing, self._retries, metrics, clock)
        self._routes = routes or RouteTable()
        self._keep_alive_s = keep_alive_s
        self.guard = guard or FieldGuard()
        self.recorder = recorder or Recorder()
        self._clock = clock
        self.sizer = PromptSizer()

    def set_limits(
        self,
        *,
        max_body_bytes: int,
        max_open_requests: int,
        max_pass_through: int,
        first_token_timeout_s: float | None,
        keep_alive_s: float | None,
        routes: RouteTable,
        limits: Limits,
    ) -> None:
        """Replace the arguments of these names. Requests that wait for a turn at an engine keep their limit."""
        self._max_body_bytes, self._max_open_requests = max_body_bytes, max_open_requests
        self._first_token_timeout_s, self._keep_alive_s, self._routes = first_token_timeout_s, keep_alive_s, routes
        self._limits, self.bodies.limit = limits, limits.body_memory_bytes
        self._passing.set_limits(max_pass_through, limits.stall_s)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        http = HttpRequest(scope, receive, send, self._clock(), self._routes.find(scope["path"]))
        task = asyncio.current_task()
        assert task is not None
        self.in_flight += 1
        self._tasks.add(task)
        try:
            await self._answer(http)
        finally:
            self.in_flight -= 1
            self._tasks.discard(task)
            self._metrics.on_response(http.route.label, http.status)
            self._record(http)

    async def _answer(self, http: HttpRequest) -> None:
        """Serve ``http``, and answer with an error response if that fails."""
        try:
            key = self._authenticate(http)
            http.tenant = key.tenant
            with self.bodies.reservation() as memory:
                # NOTE: no local variable for the body here. It would keep up to `max_body_bytes` for each open request.
                if http.route.generation is not None:
                    call = self._read(http, key, http.route.generation, await self._receive_body(http, memory))
                    with self._keep_alive(call):
                        await self._schedule(call)
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
            raise loading(min(queue.back_in_s(self._clock()) for queue in self._router.engine_queues))
        return key

    async def _receive_body(self, http: HttpRequest, memory: BodyReservation) -> bytes:
        try:
            return await read_limited_body(http.headers, http.receive, self._max_body_bytes, memory, self._limits)
        except ApiError:
            http.give_up_body()
            raise

    def _read(self, http: HttpRequest, key: ApiKey, route: GenerationRoute, body: bytes) -> Call:
        """Parse the body, read the SLO, estimate the prompt size. Nothing here depends on an engine."""
        received_s = self._clock()
        document = parse_document(body)
        output_tokens = read_output_tokens(http.headers, document)
        self.guard.apply(document, key)
        model, pool = self._model_of(document, key)
        previous = document.get("previous_response_id")
        slo_class, slo = read_slo(http.headers, key, self.classes)
        prompt = route.read_prompt(document)
        request = Request(
            id=uuid.uuid4().hex,
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
        if self._keep_alive_s is None or call.document.get("stream") is not True:
            return contextlib.nullcontext()
        return KeepAlive(call.http, self._keep_alive_s)

    def _model_of(self, document: dict[str, Any], key: ApiKey) -> tuple[str, list[EngineQueue]]:
        """Return the model that the request names, or the default, and its pool. Raises `ApiError` 404 without one."""
        model = requested_model(document) or self._router.default_model
        check_model(model, key, self._router)
        try:
            return model, self._router.pool(model)
        except UnknownModel:
            raise model_not_found(model) from None

    async def _schedule(self, call: Call) -> None:
        """Take the request from placement to its outcome. The ledger entry is opened and closed once."""
        # NOTE: before the prompt is measured, which takes an engine's tokenizer. `in_flight` counts this request.
        if self.in_flight > self._max_open_requests:
            raise self._closed(self._open(call), "rejected", "gateway_full", self._gateway_full())
        await self._place(call)
        entry = self._open(call)
        client = ClientConnection(call.http.receive)
        try:
            if call.size.invalid and await self._refused(call, entry, client):
                return
            await self._predict(call, entry)
            await self._serve(call, entry, client)
        except BaseException as error:
            if entry.outcome is None:
                self._ledger.close(entry, *_outcome_of(error, call.http))
            raise
        finally:
            client.close()

    def _open(self, call: Call) -> Entry:
        """Open the ledger entry of the request, and note what the HTTP request tells about it."""
        http, entry = call.http, self._ledger.open(call.request)
        http.entry, entry.client_id, entry.route = entry, http.request_id.decode(), http.route.label
        entry.stream, entry.received_s = call.document.get("stream") is True, call.received_s
        headers = http.headers
        self.recorder.opened(entry, headers.get("traceparent"), headers.get("tracestate"))
        return entry

    async def _refused(self, call: Call, entry: Entry, client: ClientConnection) -> bool:
        """Have the engine answer a request that it will refuse, without any wait. Returns False if it did not."""
        engine_queue = await self._place(call)
        if not call.size.invalid:
            # It is placed on another engine now, which can serve it.
            return False
        now = self._clock()
        entry.begin_attempt(Attempt(engine_queue.engine.name, now, admitted_s=now))
        answered = await self._forward(call, entry, engine_queue, client)
        # The next engine, which may be this one after a restart, may find it valid.
        call.engine = None
        return answered

    async def _place(self, call: Call) -> EngineQueue:
        """Place the request on an engine and measure its prompt there.

        The prompt is measured again for every new engine, since tokenizers differ. Raises `ApiError` 404 if no engine
        serves the model any more, or 400 if the engine cannot serve the request.
        """
        request = call.request
        try:
            engine_queue = self._router.place(request)
        except UnknownModel:
            raise model_not_found(request.requested_model) from None
        engine = engine_queue.engine
        request.model = engine.state.own_name(request.requested_model) or engine.state.model
        if engine is not call.engine:
            call.engine = engine
            request.restore_bounds()
            _check_limits(call, engine)
            path: str = call.http.scope["path"]
            document = for_engine(call.document, request.requested_model, engine.state)
            call.size = await self.sizer.measure(request, call.prompt, path, document, engine)
        return engine_queue

    async def _predict(self, call: Call, entry: Entry) -> None:
        """Predict the output length, unless the client states it. `LengthPredictor` bounds the time that this takes."""
        started, request, prompt = self._clock(), call.request, call.prompt
        if call.output_tokens is not None:
            limit = request.max_tokens
            if call.engine is not None:
                limit = max(1.0, min(limit, call.engine.state.max_model_len - request.prompt_tokens))
            prediction = self._predictor.from_hint(call.output_tokens, request.slo_class, limit, prompt.min_tokens)
        else:
            prediction = await self._predictor.predict(
                prompt.text,
                request.prompt_tokens,
                request.slo_class,
                prompt.max_tokens,
                prompt.min_tokens,
                model=request.model,
                request_id=request.id,
            )
        entry.prediction, ended = prediction, self._clock()
        entry.predicting_s = started, ended
        request.predict(prediction.tokens, prediction.p90, prediction.beyond)
        self._metrics.on_prediction(prediction.source, ended - started)

    async def _serve(self, call: Call, entry: Entry, client: ClientConnection) -> None:
        """Queue the request and send it to the engine that admits it, and to another one if that engine fails it."""
        self._retries.on_request(self._clock())
        served = False
        try:
            while not served:
                engine_queue = await self._admit(call, entry, client)
                try:
                    served = await self._forward(call, entry, engine_queue, client)
                finally:
                    engine_queue.leave(call.request)
                    if all(queue is not engine_queue for queue, _, _ in call.suspects):
                        self._router.on_ended(engine_queue, call.request)
        finally:
            # No other engine has served the request, so it tells nothing about these.
            for queue, _, _ in call.suspects:
                self._router.on_ended(queue, call.request)

    async def _admit(self, call: Call, entry: Entry, client: ClientConnection) -> EngineQueue:
        """Queue the request until a policy admits it, and return that engine's queue. Raises `ApiError` if none does.

        The request is placed again first: since the last time, its length was predicted and the engines' loads changed.
        """
        outcome: QueueOutcome = Reroute()
        while isinstance(outcome, Reroute):
            engine_queue = await self._place(call)
            attempt = entry.begin_attempt(Attempt(engine_queue.engine.name, self._clock()))
            attempt.waiting, attempt.running = len(engine_queue.waiting), len(engine_queue.running)
            entry.prompt_source = call.size.source
            self._router.on_sent(engine_queue, call.request)
            try:
                outcome = await _wait_in_queue(call.request, engine_queue, client, attempt)
            finally:
                if not isinstance(outcome, Admitted):
                    self._router.on_ended(engine_queue, call.request)
            if isinstance(outcome, Reroute):
                attempt.stop("moved", self._clock())
        now = self._clock()
        entry.queue_s = now - call.request.arrival_s
        if not isinstance(outcome, Admitted):
            entry.answer = outcome
            raise self._closed(entry, "rejected", *answer_to(outcome))
        entry.predicted_ttft_s = attempt.predicted_ttft_s = outcome.predicted_ttft_s
        attempt.admitted_s = now
        attempt.predicted_tpot_s = _next_step_s(engine_queue)
        return engine_queue

    async def _forward(self, call: Call, entry: Entry, engine_queue: EngineQueue, client: ClientConnection) -> bool:
        """Have the engine serve the request. Returns False if it failed and the request is to be queued again."""
        request, http, engine = call.request, call.http, engine_queue.engine
        # An engine that was down when the request was placed knows its limits only now.
        _check_limits(call, engine)
        sent_at = self._clock()
        began = partial(self._on_first_token, call, engine_queue, sent_at)
        progress = Progress(request, began, partial(engine_queue.on_cache_hit, request))
        entry.estimated_prompt_tokens = request.prompt_tokens if call.size.estimated else None
        entry.predicted_cached_tokens = request.cached_tokens
        report = http.headers.get(REPORT_HEADER, "").strip() == "1"
        send: Send = http.send
        if http.scope["path"] == RESPONSES_PATH:
            send = noting_id(send, partial(self._router.remember_owner, engine_name=engine.name))
        stored = bool(call.document.get("previous_response_id"))
        held = HeldResponse(
            partial(may_fail_over, scheduled=True, moves_on_404=not stored),
            partial(self._has_others, call, engine_queue),
        )
        relay = ResponseRelay(
            entry, progress, send, http.request_id, call.route, report=report, held=held, clock=self._clock
        )
        gate = engine_queue.policy.gate if engine_queue.policy.gate != UNGATED else ""
        xargs = gate_xargs(request.kind, request.pace_s, gate)
        in_body = engine.takes_xargs and call.route.takes_xargs
        document = for_engine(call.document, request.requested_model, engine.state)
        body = JsonBody(document_for_engine(document, xargs if in_body else None))
        scope = engine_scope(http.scope, http.request_id)
        if entry.trace is not None and entry.trace.span_id:
            scope["headers"] = with_traceparent(scope["headers"], entry.trace)
        scope[BODY_KEY], scope[OBSERVER_KEY], scope[XARGS_KEY] = body, progress, xargs
        scope[RENDERING_KEY] = call.size.handle
        watch = self._hang_watch(call, engine_queue, relay, sent_at)
        stall_s, grace_s = self._limits.stall_s, LEAVE_GRACE_S if engine.watches_disconnect else 0.0
        error = await call_engine(engine.app, scope, body, relay, client, stall_s, grace_s, watch, self._clock)
        if await self._fails_over(call, entry, engine_queue, relay, error, sent_at):
            return False
        relay.measure(self._clock())
        entry.cached_tokens = progress.cached_tokens
        if call.size.estimated and progress.prompt_tokens:
            self.sizer.learn(call.prompt, engine.state.model, progress.prompt_tokens)
        if relay.complete:
            await self._conclude(entry, relay, engine)
        else:
            await self._fail(entry, relay, engine_queue, error)
        return True

    def _hang_watch(
        self, call: Call, engine_queue: EngineQueue, relay: ResponseRelay, sent_at: float
    ) -> HangWatch | None:
        """Return what notices that the engine hangs; None if no other engine could serve the request instead."""
        request, timeout_s = call.request, self._first_token_timeout_s
        if timeout_s is None or len(self._router.engine_queues) == 1:
            return None

        def can_move() -> bool:
            return not relay.started and engine_queue.can_move(request) and self._denial(call, engine_queue) == ""

        return HangWatch(request, engine_queue.running, engine_queue.engine.state, timeout_s, sent_at, can_move)

    def _on_first_token(self, call: Call, engine_queue: EngineQueue, sent_at: float) -> None:
        """Note that the engine serves the request. Engines that failed it before are to blame for that."""
        engine_queue.on_first_token()
        self._router.on_success(engine_queue, sent_at)
        for suspect, reason, tried_at in call.suspects:
            self._router.on_failure(suspect, reason, tried_at)
        call.suspects.clear()

    async def _fails_over(
        self,
        call: Call,
        entry: Entry,
        engine_queue: EngineQueue,
        relay: ResponseRelay,
        error: BaseException | None,
        sent_at: float,
    ) -> bool:
        """Note how the engine did, and return whether the request is to be queued again for another one.

        If not, the error response that was held back is sent. Raises `ApiError` 503 if no engine was reachable.
        """
        request, router = call.request, self._router
        failure = None if relay.complete and relay.held.error is None else failure_of(error, relay.held)
        if failure is None:
            if relay.failed_in_stream and not relay.refused_in_stream:
                router.on_failure(engine_queue, "cut", sent_at, begun=True)
            elif relay.complete and relay.status < 400:
                router.on_completed(engine_queue)
            return False
        entry.attempts[-1].stop(failure.reason, self._clock())
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
            self._metrics.failovers.labels(engine_queue.engine.name, failure.reason).inc()
            request.wait_again()
            return True
        if failure.unsent and not relay.started:
            raise self._closed(
                entry,
                "failed",
                "engine_lost",
                unavailable("No engine accepted this request.", "engine_unavailable", 5.0),
            )
        if error is None:
            await relay.release()
        return False

    def _has_retry(self, call: Call, engine_queue: EngineQueue, failure: Failure) -> bool:
        """Whether the request may be queued again, and take the retry from the budget."""
        if failure.unsent:
            # It costs no engine any work, and the same engine may be up again.
            call.unsent += 1
            return call.unsent < max(MAX_TRIES, len(self._router.engine_queues))
        if not self._has_others(call, engine_queue):
            return False
        denial = self._denial(call, engine_queue)
        if denial:
            self._metrics.failovers_denied.labels(denial).inc()
            return False
        return self._retries.spend(self._clock())

    def _has_others(self, call: Call, engine_queue: EngineQueue) -> bool:
        """Whether a live engine other than that of ``engine_queue`` serves the model and has not failed the request."""
        return any(queue is not engine_queue for queue in self._router.others(call.request))

    def _denial(self, call: Call, engine_queue: EngineQueue) -> str:
        """Return why the request may not go to another engine: ``deadline`` or ``budget``; "" if it may."""
        request, now = call.request, self._clock()
        waives = engine_queue.classes[request.slo_class].on_unattainable == "best_effort"
        if now > request.deadline_s and not waives:
            return "deadline"
        return "" if self._retries.available(now) else "budget"

    async def _conclude(self, entry: Entry, relay: ResponseRelay, engine: Engine) -> None:
        """Close the entry of a request whose response is complete."""
        self._ledger.close(entry, *relay.outcome)
        if entry.outcome == "finished":
            self._learn_length(entry, engine)
        await relay.end()

    async def _fail(
        self, entry: Entry, relay: ResponseRelay, engine_queue: EngineQueue, error: BaseException | None
    ) -> None:
        """Close the entry of a request whose engine did not complete the response, and end the response."""
        if isinstance(error, BodyTooDeep):
            raise self._closed(entry, "rejected", "invalid_json", too_deep())
        if isinstance(error, EngineLost):
            stops = self.stopping or engine_queue.retired
            self._ledger.close(entry, "failed", "draining" if stops else "engine_lost")
            answer = self._engine_lost(engine_queue)
        else:
            log.error(
                "engine %s failed on request %s: %s", engine_queue.engine.name, entry.request.id, type(error).__name__
            )
            self._ledger.close(entry, "failed", "engine_error")
            answer = ApiError(502, "The engine failed on this request.", "engine_error", "engine_error")
        await relay.fail(answer)

    def _learn_length(self, entry: Entry, engine: Engine) -> None:
        """Report the output length of a finished request to the predictor."""
        request = entry.request
        self._predictor.observe(request.slo_class, round(request.generated / request.sequences))
        # Of several sequences only the mean length is known, which is not the length of any of them.
        if entry.prediction is not None and request.sequences == 1 and request.generated:
            limit = min(request.max_tokens, engine.state.max_model_len - request.prompt_tokens)
            censored = request.generated >= limit
            self._predictor.report(
                entry.prediction, request.id, request.model, request.slo_class, request.generated, censored
            )

    # --- other routes, and errors -------------------------------------------------------------------------------------

    async def _pass_through(self, http: HttpRequest, key: ApiKey, body: bytes) -> None:
        """Answer a request that is not scheduled."""
        if asks_for_models(http):
            await send_models(http, self._router, key)
            return
        if asks_for_records(http):
            await send_records(http, self.recorder.decisions, key)
            return
        if self.in_flight > self._max_open_requests:
            raise self._gateway_full()
        try:
            check_body_model(http, body, key, self._router)
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

    def _closed(self, entry: Entry, outcome: Outcome, reason: str, error: ApiError) -> ApiError:
        """Close ``entry`` and return ``error``, for the caller to raise."""
        self._ledger.close(entry, outcome, reason)
        return error

    def _gateway_full(self) -> ApiError:
        now = self._clock()
        ends = [queue.admission.first_end_in_s(now) for queue in self._router.engine_queues if queue.running]
        retry_after_s = max(1.0, min(ends, default=1.0))
        return queue_full("The gateway has too many open requests.", self._max_open_requests, retry_after_s)

    def _engine_lost(self, engine_queue: EngineQueue) -> ApiError:
        if self.stopping:
            return draining()
        if engine_queue.retired:
            return engine_removed()
        retry_after_s = engine_queue.back_in_s(self._clock())
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


def _outcome_of(error: BaseException, http: HttpRequest) -> tuple[Outcome, str]:
    """Return outcome and reason of a request that ``error`` ended before its entry was closed."""
    if isinstance(error, ClientDisconnected):
        return "cancelled", "client_slow" if isinstance(error, ClientStalled) or http.client_is_slow else "client_left"
    if isinstance(error, asyncio.CancelledError):
        return "cancelled", "shutdown"
    if isinstance(error, ApiError):
        # The engine that the request was placed on again cannot serve it.
        return "rejected", "engine_refused"
    return "failed", "gateway_error"


def _check_limits(call: Call, engine: Engine) -> None:
    """Raise `ApiError` 404 if ``engine`` does not serve the model, or 400 if it cannot serve the request safely."""
    state, model = engine.state, call.request.requested_model
    if model and state.models is not None and state.own_name(model) is None and not state.serves_any_model:
        raise model_not_found(model)
    check_with_engine(call.document, engine)
    sequences, limit = call.prompt.sequences, engine.state.max_num_seqs
    if sequences > limit:
        raise bad_request(f"n: the engine runs at most {limit} sequences; this request has {sequences}.", "n")


def _next_step_s(engine_queue: EngineQueue) -> float:
    """Return the predicted duration (s) of the engine's next decode step, from what the engine reports that it runs."""
    state = engine_queue.engine.state
    sequences = max(state.engine_running, len(engine_queue.running), 1)
    return state.step_time.curve.step_s(sequences, state.kv_usage * state.kv_tokens)


async def _wait_in_queue(
    request: Request, engine_queue: EngineQueue, client: ClientConnection, attempt: Attempt
) -> QueueOutcome:
    """Queue ``request`` and return what was decided. Raises `ClientDisconnected` if the client disconnects first."""
    decision = engine_queue.submit(request)
    if decision.done():
        return decision.result()
    attempt.position = engine_queue.waiting.position(request)
    waits: set[asyncio.Future[Any]] = {decision, client.disconnected}
    try:
        await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
    except asyncio.CancelledError:
        # The request may have been admitted in the same turn of the event loop.
        engine_queue.leave(request)
        raise
    finally:
        if not decision.done():
            decision.cancel()
            engine_queue.withdraw(request)
    if decision.cancelled():
        raise ClientDisconnected
    return decision.result()
