"""One scheduled request, from its first byte to its outcome.

authenticate -> read SLO -> count prompt tokens -> ask predictor (time-boxed) -> class queue -> engine -> ledger
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import time
import uuid
from collections.abc import Callable
from typing import Any

from starlette.datastructures import Headers as HeaderView

from engine_adapter.engine import OBSERVER_KEY, ASGIApp, EngineLost, EngineUnreachable, Message, Receive, Scope, Send
from gateway.api.auth import ApiKey, KeyRing
from gateway.api.errors import ApiError, bad_request, unavailable
from gateway.api.prompt import Prompt, read_prompt
from gateway.api.rejections import queue_full, unattainable
from gateway.api.request_body import (
    MAX_HEADERS,
    ClientLeftError,
    body_for_engine,
    check_with_engine,
    engine_scope,
    parse_body,
    passed_on_body,
    read_body,
    read_request_id,
)
from gateway.api.response_relay import ClientSide, ResponseRelay, send_error
from gateway.api.slo_headers import read_slo
from gateway.api.slo_report import REPORT_HEADER
from gateway.observability.ledger import Entry, Ledger
from gateway.observability.metrics import Metrics
from gateway.policies.base import UNGATED, Rejection
from gateway.prediction.client import LengthPredictor
from gateway.requests.progress import Progress
from gateway.requests.request import Request
from gateway.requests.slo import SloClass
from gateway.scheduling.engine_queue import Admitted, EngineDown, EngineQueue, QueueFull, Reroute
from gateway.scheduling.router import Router

log = logging.getLogger("antares.proxy")

SCHEDULED = {"/v1/chat/completions": True, "/v1/completions": False}
"""The routes that are scheduled; the value tells chat from text completion."""

MAX_TRIES = 3
"""How often a request is handed to an engine that turns out to be gone before it took it."""

STALL_S = 300.0
"""A client that takes nothing of what it is sent for so long (up to twice that) has left."""

LEAVE_GRACE_S = 1.0
"""An engine's app is told that the client left; if it has not returned after this long, it is cancelled."""


class Proxy:
    """Serves the scheduled routes and passes every other `/v1/*` route on to an engine."""

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
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.draining = False
        self.in_flight = 0
        self._router = router
        self._classes = classes
        self._keys = keys
        self._predictor = predictor
        self._ledger = ledger
        self._metrics = metrics
        self._max_body = max_body_bytes
        self._max_open = max_open_requests
        self._clock = clock

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """The ASGI app for `/v1/*`."""
        arrival = self._clock()
        headers = HeaderView(scope=scope)
        request_id = read_request_id(headers.get("x-request-id"))
        route = scope["path"] if scope["path"] in SCHEDULED else "/v1/*"
        status, started = 500, False

        async def counted_send(message: Message) -> None:
            nonlocal status, started
            if message["type"] == "http.response.start":
                status, started = message["status"], True
            await send(message)

        self.in_flight += 1
        try:
            key = self._admit_caller(headers)
            body = await read_body(headers, receive, self._max_body)
            if scope["path"] in SCHEDULED and scope["method"] == "POST":
                await self._serve(scope, headers, body, key, arrival, request_id, receive, counted_send)
            else:
                await self._pass_through(scope, headers, body, request_id, receive, counted_send)
        except ApiError as error:
            await send_error(counted_send, error, request_id)
        except ClientLeftError:
            status = 499
        except Exception as error:
            # NOTE: an exception's text may quote the request, so only its type is logged outside debug level.
            debugging = log.isEnabledFor(logging.DEBUG)
            log.error("a request failed inside the gateway: %s", type(error).__name__, exc_info=debugging)
            if not started:
                internal = ApiError(500, "The gateway failed on this request.", "internal_error", "internal_error")
                await send_error(counted_send, internal, request_id)
        finally:
            self.in_flight -= 1
            self._metrics.http_requests.labels(route, status).inc()

    # --- scheduled requests -----------------------------------------------------------------------------------------

    async def _serve(
        self,
        scope: Scope,
        headers: HeaderView,
        body: bytes,
        key: ApiKey,
        arrival: float,
        request_id: bytes,
        receive: Receive,
        send: Send,
    ) -> None:
        document = parse_body(body)
        slo_class, slo = read_slo(headers, key, self._classes)
        candidate = self._router.engine_queues[0].engine
        prompt = read_prompt(document, SCHEDULED[scope["path"]], candidate.count_tokens)
        check_with_engine(document, candidate)
        if prompt.sequences > candidate.state.max_num_seqs:
            most = candidate.state.max_num_seqs
            raise bad_request(
                f"n: the engine runs at most {most} sequences, but this asks for {prompt.sequences}.", "n"
            )
        body_for_engine(document, None)  # what cannot be written again must not be accepted
        request = Request(
            id=uuid.uuid4().hex,
            slo_class=slo_class.name,
            arrival_s=arrival,
            slo=slo,
            prompt_tokens=prompt.tokens,
            predicted_tokens=1.0,
            sequences=prompt.sequences,
            tenant=key.tenant,
            model=candidate.state.model,
            max_tokens=math.inf if prompt.max_tokens is None else prompt.max_tokens,
        )
        entry = self._ledger.open(request)
        if self.in_flight > self._max_open:
            self._ledger.close(entry, "rejected", "gateway_full")
            raise queue_full("The gateway has as many open requests as it takes.", self._max_open, 1.0)
        client = ClientSide(receive)
        try:
            await self._predict(entry, prompt)
            report = headers.get(REPORT_HEADER) == "1"
            served, tries = False, 0
            while not served:
                if tries == MAX_TRIES:
                    self._ledger.close(entry, "failed", "engine_lost")
                    raise unavailable("No engine took this request.", "engine_unavailable", 5.0)
                tries += 1
                engine_queue = await self._wait_for_admission(entry, client)
                try:
                    served = await self._forward(scope, document, entry, engine_queue, client, request_id, report, send)
                finally:
                    engine_queue.leave(request)
        except ClientLeftError:
            self._ledger.close(entry, "cancelled", "client_left")
            raise
        except asyncio.CancelledError:
            if entry.outcome is None:
                self._ledger.close(entry, "cancelled", "shutdown")
            raise
        except Exception:
            # Usually an ApiError whose outcome is written already.
            if entry.outcome is None:
                self._ledger.close(entry, "failed", "gateway_error")
            raise
        finally:
            client.close()

    async def _predict(self, entry: Entry, prompt: Prompt) -> None:
        started, request = self._clock(), entry.request
        prediction = entry.prediction = await self._predictor.predict(
            prompt.text,
            prompt.tokens,
            request.slo_class,
            prompt.max_tokens,
            prompt.min_tokens,
            model=request.model,
            request_id=request.id,
        )
        request.predict(prediction.tokens, prediction.p90)
        self._metrics.predictions.labels(prediction.source).inc()
        self._metrics.prediction_seconds.observe(self._clock() - started)

    async def _wait_for_admission(self, entry: Entry, client: ClientSide) -> EngineQueue:
        """The lane that serves the request; raises `ApiError` when none will, closing the entry."""
        request = entry.request
        engine_queue, decided = self._router.submit(request)
        entry.engine, request.model = engine_queue.engine.name, engine_queue.engine.state.model
        if not decided.done():
            waits: set[asyncio.Future[Any]] = {decided, client.left}
            try:
                await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
            except asyncio.CancelledError:
                # It may have been admitted in this very turn.
                engine_queue.leave(request)
                raise
            finally:
                if not decided.done():
                    decided.cancel()
                    engine_queue.withdraw(request)
            if decided.cancelled():
                raise ClientLeftError
        entry.queue_s = self._clock() - request.arrival_s
        match decided.result():
            case Admitted(engine_queue=chosen, predicted_ttft_s=predicted):
                entry.predicted_ttft_s = predicted
                return chosen
            case Rejection() as rejection:
                self._ledger.close(entry, "rejected", f"{rejection.bound}_unattainable")
                raise unattainable(rejection)
            case QueueFull(limit=limit, retry_after_s=after):
                self._ledger.close(entry, "rejected", "queue_full")
                raise queue_full(f"The queue of class {request.slo_class!r} is full.", limit, after)
            case Reroute():
                return await self._wait_for_admission(entry, client)
            case EngineDown(retry_after_s=after):
                self._ledger.close(entry, "rejected", "engine_down")
                raise unavailable(
                    f"The engine is restarting and will not be back in time; expected in {after:.0f} s.",
                    "engine_unavailable",
                    after,
                )

    async def _forward(
        self,
        scope: Scope,
        document: dict[str, Any],
        entry: Entry,
        engine_queue: EngineQueue,
        client: ClientSide,
        request_id: bytes,
        report: bool,
        send: Send,
    ) -> bool:
        """Have the lane's engine serve the request; False if the engine was gone before it took it."""
        request = entry.request
        try:
            # Asked once more: while it waited another engine may have been chosen, or this one have come up.
            check_with_engine(document, engine_queue.engine)
        except ApiError:
            self._ledger.close(entry, "rejected", "engine_refused")
            raise
        progress = Progress(request, on_first_token=engine_queue.on_first_token)
        relay = ResponseRelay(entry, progress, send, request_id, report=report, clock=self._clock)
        gate = (
            engine_queue.policy.gate if engine_queue.policy.gate != UNGATED and engine_queue.engine.takes_xargs else ""
        )
        body = body_for_engine(document, request.pace_s, gate)
        inner_scope = engine_scope(scope, request_id, len(body))
        inner_scope[OBSERVER_KEY] = progress
        call = asyncio.ensure_future(_run(engine_queue.engine.app, inner_scope, client.replay(body), relay.send))
        try:
            stalled = False
            while not (stalled or call.done() or client.left.done()):
                await asyncio.wait({call, client.left}, timeout=STALL_S, return_when=asyncio.FIRST_COMPLETED)
                stalled = relay.stalled_since_last_asked()
            # Told that the client left, vLLM's app may still "answer" nobody; what counts is what was sent before.
            left = (client.left.done() or stalled) and not relay.complete
            if not call.done():
                await asyncio.wait({call}, timeout=LEAVE_GRACE_S)
        finally:
            if not call.done():
                call.cancel()
                with contextlib.suppress(asyncio.CancelledError, Exception):
                    await call
        if left:
            if not call.cancelled():
                call.exception()  # heard, or asyncio would log it, and it may quote the request
            raise ClientLeftError
        if not call.cancelled() and isinstance(call.exception(), EngineUnreachable):
            request.wait_again()
            return False
        await self._conclude(call, relay, entry, engine_queue)
        return True

    async def _conclude(
        self, call: asyncio.Future[None], relay: ResponseRelay, entry: Entry, engine_queue: EngineQueue
    ) -> None:
        """Give the request its one outcome."""
        request = entry.request
        error = None if call.cancelled() else call.exception()
        relay.measure(self._clock())
        if not relay.complete:
            lost = isinstance(error, EngineLost)
            if not lost:
                log.error(
                    "engine %s failed on request %s: %s", engine_queue.engine.name, request.id, type(error).__name__
                )
            self._ledger.close(entry, "failed", "engine_lost" if lost else "engine_error")
            after = engine_queue.back_in_s(self._clock())
            await relay.fail(
                unavailable("The engine died while it served this request. Send it again.", "engine_lost", after)
                if lost
                else ApiError(502, "The engine failed on this request.", "engine_error", "engine_error")
            )
            return
        if relay.failed_in_stream or relay.status >= 500:
            self._ledger.close(entry, "failed", "engine_error")
        elif relay.status >= 400:
            self._ledger.close(entry, "rejected", "engine_busy" if relay.status == 429 else "engine_refused")
        else:
            self._ledger.close(entry, "finished")
            self._learn_length(entry, engine_queue)
        await relay.end()

    def _learn_length(self, entry: Entry, engine_queue: EngineQueue) -> None:
        """Predictions are to follow what is served."""
        request = entry.request
        self._predictor.observe(request.slo_class, round(request.generated / request.sequences))
        # Of several sequences only the mean is known, which is no answer's length.
        if entry.prediction is not None and request.sequences == 1 and request.generated:
            limit = min(request.max_tokens, engine_queue.engine.state.max_model_len - request.prompt_tokens)
            censored = request.generated >= limit
            self._predictor.report(
                entry.prediction, request.id, request.model, request.slo_class, request.generated, censored
            )

    # --- everything else under /v1 ------------------------------------------------------------------------------------

    async def _pass_through(
        self, scope: Scope, headers: HeaderView, body: bytes, request_id: bytes, receive: Receive, send: Send
    ) -> None:
        engine_queue = next(
            (engine_queue for engine_queue in self._router.engine_queues if engine_queue.engine.state.alive), None
        )
        if engine_queue is None:
            after = self._router.engine_queues[0].back_in_s(self._clock())
            raise unavailable("No engine is alive.", "engine_unavailable", after)
        if self.in_flight > self._max_open:
            raise queue_full("The gateway has as many open requests as it takes.", self._max_open, 1.0)
        body = passed_on_body(scope, headers, body, engine_queue.engine)
        client = ClientSide(receive)
        started = False

        async def noted_send(message: Message) -> None:
            nonlocal started
            started = True
            await send(message)

        try:
            await engine_queue.engine.app(engine_scope(scope, request_id, len(body)), client.replay(body), noted_send)
            if not started and client.left.done():
                raise ClientLeftError
        except EngineLost as lost:
            if started:
                raise
            after = engine_queue.back_in_s(self._clock())
            raise unavailable("The engine died while it served this request.", "engine_lost", after) from lost
        finally:
            client.close()

    def _admit_caller(self, headers: HeaderView) -> ApiKey:
        if len(headers.raw) > MAX_HEADERS:
            raise bad_request(f"More than {MAX_HEADERS} headers.", None, "too_many_headers", 431)
        key = self._keys.authenticate(headers.get("authorization"))
        if self.draining:
            raise unavailable("The gateway is shutting down.", "draining", 5.0)
        return key


async def _run(app: ASGIApp, scope: Scope, receive: Receive, send: Send) -> None:
    await app(scope, receive, send)
