"""Schedules a request of a generation route: from its placement on an engine to its outcome.

`Scheduled.serve` calls `_place`, `_predict` and `_serve`. `_serve` calls `_admit` (place again and wait) and `_forward`
(encode, engine, response) for each attempt. `_conclude` or `_fail` closes the ledger entry. The body is encoded once
per attempt.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from functools import partial

from engine_adapter.asgi import BODY_KEY, BodyTooDeep, ClientDisconnected, DisconnectWatch, JsonBody
from engine_adapter.engine import (
    OBSERVER_KEY,
    PASS_EVENT_KEY,
    RENDERING_KEY,
    XARGS_KEY,
    Engine,
    EngineLost,
    EngineUnreachable,
    Send,
)
from gateway.api.call import Call
from gateway.api.engine_call import ClientStalled, call_engine
from gateway.api.errors import ApiError, bad_request, unavailable
from gateway.api.failover import HeldResponse, may_fail_over
from gateway.api.failover_decisions import Failover
from gateway.api.http_request import HttpRequest
from gateway.api.models import for_engine, model_not_found
from gateway.api.prompt_size import PromptSizer
from gateway.api.rejections import answer_to
from gateway.api.request_body import check_with_engine, document_for_engine, engine_scope, gate_xargs, too_deep
from gateway.api.response_relay import ResponseRelay
from gateway.api.slo_report import REPORT_HEADER
from gateway.api.stored_responses import RESPONSES_PATH, noting_id
from gateway.api.tenants import RATE_LIMITED, TenantAccounts
from gateway.observability.ledger import Attempt, Entry, Ledger, Outcome
from gateway.observability.metrics import Metrics
from gateway.observability.recorder import Recorder
from gateway.observability.trace_context import with_traceparent
from gateway.policies.base import UNGATED
from gateway.prediction.client import LengthPredictor, Question
from gateway.prediction.lengths import Prediction
from gateway.requests.progress import Progress
from gateway.requests.request import Request
from gateway.scheduling.engine_queue import EngineQueue
from gateway.scheduling.queue_outcome import Admitted, QueueOutcome, Reroute
from gateway.scheduling.router import Router, UnknownModel

log = logging.getLogger("antares.proxy")

LEAVE_GRACE_S = 1.0
"""Seconds that an engine's app has to return after the client disconnected. Then it is cancelled. Convention."""


class Scheduled:
    """Takes scheduled requests to their outcome.

    ``engine_lost``: returns the answer to a request whose engine died. ``stall_s``: seconds that a client may read
    nothing.
    """

    def __init__(
        self,
        router: Router,
        predictor: LengthPredictor,
        ledger: Ledger,
        recorder: Recorder,
        metrics: Metrics,
        failover: Failover,
        accounts: TenantAccounts,
        stall_s: float,
        engine_lost: Callable[[EngineQueue], ApiError],
    ) -> None:
        self._router = router
        self._predictor = predictor
        self._ledger, self._recorder = ledger, recorder
        self._metrics = metrics
        self.failover = failover
        self._accounts = accounts
        self.stall_s = stall_s
        self._engine_lost = engine_lost
        self.sizer = PromptSizer()

    async def serve(self, call: Call) -> None:
        """Take the request from placement to its outcome. The ledger entry is opened and closed once."""
        engine_queue = await self._place(call)
        entry = self._open(call)
        client = DisconnectWatch(call.http.receive, call.http.disconnected)
        try:
            if call.size.invalid and await self._refused(call, entry, client):
                return
            waited = await self._predict(call, entry, call.engine_queue or engine_queue)
            if error := self._accounts.reserve(call):
                raise self._closed(entry, "rejected", RATE_LIMITED, error)
            # Of several engines, another one may be the better one by now.
            placed = None if waited or len(self._router.engine_queues) > 1 else call.engine_queue
            await self._serve(call, entry, client, placed)
        except BaseException as error:
            if entry.outcome is None:
                self._ledger.close(entry, *_outcome_of(error, call.http))
            raise
        finally:
            self._accounts.settle(call, entry)
            client.close()

    def reject(self, call: Call, reason: str, error: ApiError) -> ApiError:
        """Note that the request is rejected before it is scheduled, and return ``error`` for the caller to raise."""
        return self._closed(self._open(call), "rejected", reason, error)

    def _open(self, call: Call) -> Entry:
        """Open the ledger entry of the request, and note what the HTTP request tells about it."""
        http, entry = call.http, self._ledger.open(call.request)
        http.entry, entry.client_id, entry.route = entry, http.request_id.decode(), http.route.label
        entry.stream, entry.received_s = call.document.get("stream") is True, call.received_s
        headers = http.headers
        self._recorder.opened(entry, headers.get("traceparent"), headers.get("tracestate"))
        return entry

    async def _refused(self, call: Call, entry: Entry, client: DisconnectWatch) -> bool:
        """Have the engine answer a request that it will refuse, without any wait. Returns False if it did not."""
        engine_queue = await self._place(call)
        if not call.size.invalid:
            # It is placed on another engine now, which can serve it.
            return False
        now = time.monotonic()
        entry.begin_attempt(Attempt(engine_queue.engine.name, now, admitted_s=now))
        answered = await self._forward(call, entry, engine_queue, client)
        # The next engine, which may be this one after a restart, may find it valid.
        call.engine_queue = None
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
        if engine_queue is not call.engine_queue:
            call.engine_queue = engine_queue
            request.restore_bounds()
            _check_limits(call, engine)
            path: str = call.http.scope["path"]
            document = for_engine(call.document, request.requested_model, engine.state)
            call.size = await self.sizer.measure(request, call.prompt, path, document, engine)
        return engine_queue

    async def _predict(self, call: Call, entry: Entry, engine_queue: EngineQueue) -> bool:
        """Predict the output length, unless the client states it. Return whether the request waited for that.

        `LengthPredictor` bounds the time that this takes. While the engine has ample room, the request does not wait.
        It starts with the usual length of its class, and the prediction replaces that later.
        """
        started, request, prompt = time.monotonic(), call.request, call.prompt
        if call.output_tokens is not None:
            limit = max(1.0, min(request.max_tokens, engine_queue.engine.state.max_model_len - request.prompt_tokens))
            prediction = self._predictor.from_hint(call.output_tokens, request.slo_class, limit, prompt.min_tokens)
        else:
            question = Question(
                prompt.text, request.prompt_tokens, request.slo_class, prompt.max_tokens, prompt.min_tokens,
                request.model, request.id,
            )  # fmt: skip
            if self._predictor.up:
                usual = self._predictor.usual(question)
                request.predict(usual.tokens, usual.p90)
                if engine_queue.has_ample_room(request):
                    entry.prediction = usual
                    self._predictor.predict_later(question, entry.is_open, partial(self._on_length, entry))
                    return False
            prediction = await self._predictor.predict(question)
        entry.prediction, ended = prediction, time.monotonic()
        entry.predicting_s = started, ended
        request.predict(prediction.tokens, prediction.p90, prediction.beyond)
        self._metrics.on_prediction(prediction.source, ended - started)
        return True

    def _on_length(self, entry: Entry, prediction: Prediction | None) -> None:
        """Take the predicted length of a request that did not wait for it. It may have ended, so nothing of it is kept.

        ``entry.predicting_s`` stays None: these are seconds that the request waited.
        """
        self._metrics.on_prediction("fallback" if prediction is None else prediction.source, 0.0)
        name = entry.attempts[-1].engine if entry.attempts else ""
        engine_queue = next((queue for queue in self._router.engine_queues if queue.engine.name == name), None)
        if prediction is None or engine_queue is None:
            return
        if entry.outcome is None:
            entry.prediction = prediction
            engine_queue.on_predicted_length(entry.request, prediction.tokens, prediction.p90)
        elif entry.outcome == "finished":
            entry.prediction = prediction
            self._report_length(entry, engine_queue.engine)

    async def _serve(self, call: Call, entry: Entry, client: DisconnectWatch, placed: EngineQueue | None) -> None:
        """Queue the request and send it to the engine that admits it, and to another one if that engine fails it.

        ``placed``: where it was placed just now and has ample room, if it was.
        """
        self.failover.budget.on_request(time.monotonic())
        served = False
        try:
            while not served:
                engine_queue = await self._admit(call, entry, client, placed)
                placed = None
                try:
                    served = await self._forward(call, entry, engine_queue, client)
                finally:
                    engine_queue.leave(call.request)
                    if not call.suspects or all(queue is not engine_queue for queue, _, _ in call.suspects):
                        self._router.on_ended(engine_queue, call.request)
        finally:
            # No other engine has served the request, so it tells nothing about these.
            for queue, _, _ in call.suspects:
                self._router.on_ended(queue, call.request)

    async def _admit(
        self, call: Call, entry: Entry, client: DisconnectWatch, placed: EngineQueue | None
    ) -> EngineQueue:
        """Queue the request until a policy admits it, and return that engine's queue. Raises `ApiError` if none does.

        Unless it was ``placed`` just now, it is placed again first: since the last time, its length was predicted and
        the engines' loads changed.
        """
        outcome: QueueOutcome = Reroute()
        while isinstance(outcome, Reroute):
            engine_queue = placed or await self._place(call)
            # `_predict` has found ample room where it was placed, in this turn of the event loop.
            at_once = placed is not None or engine_queue.has_ample_room(call.request)
            placed = None
            attempt = entry.begin_attempt(Attempt(engine_queue.engine.name, time.monotonic()))
            attempt.waiting, attempt.running = len(engine_queue.waiting), len(engine_queue.running)
            entry.prompt_source = call.size.source
            self._router.on_sent(engine_queue, call.request)
            try:
                outcome = await _wait_in_queue(call.request, engine_queue, client, attempt, at_once)
            finally:
                if not isinstance(outcome, Admitted):
                    self._router.on_ended(engine_queue, call.request)
            if isinstance(outcome, Reroute):
                attempt.stop("moved", time.monotonic())
        now = time.monotonic()
        entry.queue_s = now - call.request.arrival_s
        if not isinstance(outcome, Admitted):
            entry.answer = outcome
            raise self._closed(entry, "rejected", *answer_to(outcome))
        entry.predicted_ttft_s = attempt.predicted_ttft_s = outcome.predicted_ttft_s
        attempt.admitted_s = now
        attempt.predicted_tpot_s = _next_token_s(engine_queue)
        return engine_queue

    async def _forward(self, call: Call, entry: Entry, engine_queue: EngineQueue, client: DisconnectWatch) -> bool:
        """Have the engine serve the request. Returns False if it failed and the request is to be queued again."""
        request, http, engine = call.request, call.http, engine_queue.engine
        # An engine that was down when the request was placed knows its limits only now.
        _check_limits(call, engine)
        sent_at = time.monotonic()
        began = partial(self.failover.on_first_token, call, engine_queue, sent_at)
        progress = Progress(request, began, partial(engine_queue.on_cache_hit, request))
        entry.estimated_prompt_tokens = request.prompt_tokens if call.size.estimated else None
        entry.predicted_cached_tokens = request.cached_tokens
        report = http.headers.get(REPORT_HEADER, "").strip() == "1"
        # NOTE: passed events do not go through it, so nothing may be put around it that changes later events.
        send: Send = http.send
        if http.scope["path"] == RESPONSES_PATH:
            send = noting_id(send, partial(self._router.remember_owner, engine_name=engine.name))
        stored = bool(call.document.get("previous_response_id"))
        held = HeldResponse(
            partial(may_fail_over, scheduled=True, moves_on_404=not stored),
            partial(self.failover.has_others, call, engine_queue),
        )
        relay = ResponseRelay(
            entry, progress, send, http.request_id, call.route, report=report, held=held, event_writer=http.event_writer
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
        scope[RENDERING_KEY], scope[PASS_EVENT_KEY] = call.size.handle, relay.pass_event
        watch = self.failover.hang_watch(call, engine_queue, relay, sent_at)
        stall_s, grace_s = self.stall_s, LEAVE_GRACE_S if engine.watches_disconnect else 0.0
        engine_queue.on_handover(request)
        error = await call_engine(engine.app, scope, body, relay, client, stall_s, grace_s, watch)
        if await self.failover.fails_over(call, entry, engine_queue, relay, error, sent_at):
            return False
        relay.measure(time.monotonic())
        entry.cached_tokens = progress.cached_tokens
        if call.size.estimated and progress.prompt_tokens:
            self.sizer.learn(call.prompt, engine.state.model, progress.prompt_tokens)
        if relay.complete:
            await self._conclude(entry, relay, engine)
        else:
            await self._fail(entry, relay, engine_queue, error)
        return True

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
        if isinstance(error, EngineUnreachable) and not relay.started:
            answer = unavailable("No engine accepted this request.", "engine_unavailable", 5.0)
            raise self._closed(entry, "failed", "engine_lost", answer)
        if isinstance(error, EngineLost):
            answer = self._engine_lost(engine_queue)
            self._ledger.close(entry, "failed", answer.code or "engine_lost")
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
        self._report_length(entry, engine)

    def _report_length(self, entry: Entry, engine: Engine) -> None:
        """Tell the predictor service the output length, if it predicted it."""
        request = entry.request
        # Of several sequences only the mean length is known, which is not the length of any of them.
        if entry.prediction is not None and request.sequences == 1 and request.generated:
            limit = min(request.max_tokens, engine.state.max_model_len - request.prompt_tokens)
            censored = request.generated >= limit
            self._predictor.report(
                entry.prediction, request.id, request.model, request.slo_class, request.generated, censored
            )

    def _closed(self, entry: Entry, outcome: Outcome, reason: str, error: ApiError) -> ApiError:
        """Close ``entry`` and return ``error``, for the caller to raise."""
        self._ledger.close(entry, outcome, reason)
        return error


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


def _next_token_s(engine_queue: EngineQueue) -> float:
    """Return the predicted seconds per token of the next decode step, from what the engine reports that it runs."""
    state = engine_queue.engine.state
    sequences = max(state.engine_running, len(engine_queue.running), 1)
    return state.step_time.curve.step_s(sequences, state.kv_usage * state.kv_tokens) / state.tokens_per_step


async def _wait_in_queue(
    request: Request, engine_queue: EngineQueue, client: DisconnectWatch, attempt: Attempt, at_once: bool
) -> QueueOutcome:
    """Queue the request (`EngineQueue.submit`) and return what was decided. Raises `ClientDisconnected`."""
    decision = engine_queue.submit(request, at_once)
    if decision.done():
        return decision.result()
    attempt.position = engine_queue.waiting.position(request)
    # NOTE: not `asyncio.wait` for both, which makes a waiter and two callbacks.
    client.disconnected.add_done_callback(lambda _: decision.cancel())
    try:
        return await decision
    except asyncio.CancelledError:
        if not decision.cancelled():
            # The request was admitted in the turn of the event loop in which the task was cancelled.
            engine_queue.leave(request)
            raise
        engine_queue.withdraw(request)
        task = asyncio.current_task()
        if task is not None and task.cancelling():
            raise
        raise ClientDisconnected from None
