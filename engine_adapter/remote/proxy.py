"""The reverse proxy behind `HttpEngine`. It forwards requests and responses and counts output tokens."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Any

import orjson

from engine_adapter.asgi import (
    BODY_KEY,
    ClientDisconnected,
    JsonBody,
    encode_json,
    read_body,
    run_until_disconnect,
)
from engine_adapter.engine import (
    OBSERVER_KEY,
    EngineEvents,
    EngineLost,
    EngineState,
    EngineUnreachable,
    Receive,
    Scope,
    Send,
)
from engine_adapter.remote.assembled import assembled
from engine_adapter.remote.client import Upstream
from engine_adapter.remote.client_request import USUAL_DONE, BadUpstreamError, ClientRequest, NullObserver
from engine_adapter.remote.counting.by_path import counter_for
from engine_adapter.remote.counting.completions import CompletionCounter
from engine_adapter.remote.counting.token_counter import EventKind, TokenCounter
from engine_adapter.remote.events import EventReader
from engine_adapter.remote.request import (
    CompletionPlan,
    downstream_headers,
    parse_completion,
    target,
    upstream_headers,
)
from engine_adapter.remote.response import READABLE_ENCODINGS, Response
from engine_adapter.remote.slots import Slots
from engine_adapter.remote.sse import parse_data
from engine_adapter.remote.step_samples import StepSampler, StreamTiming
from engine_adapter.remote.upstream_error import error_status

log = logging.getLogger("antares.engine.http")

BYTES_PER_TOKEN = 4
"""Bytes of request body per prompt token: an estimate that holds until the server reports its usage."""
LARGEST_PARSED = 8 << 20
"""Largest non-streaming response (bytes) that is parsed for its usage. Bounds the memory of the copy."""
_MAY_REJECT = frozenset((400, 422, 500, 501))
"""Statuses by which servers reject a stream or ``stream_options``."""
LOST_LOGGED_S = 10.0
"""Shortest time (s) between two log lines about lost responses. A dying server loses many at once."""


class HttpProxy:
    """ASGI app over an `Upstream`.

    It forwards every server response, whatever its status, except these:

    * A 5xx without a body comes from a dying server, or from a load balancer in front of a dead one: `EngineLost`.
      429 and 503 are always forwarded: the server is alive and asks the client to retry later.
    * A redirect, an HTML page with status 200, and a completion that cannot be read become 502, naming the engine.

    Inside a stream, an error of the server is sent with `FAILED_KEY`. In a completion it always has the form
    ``data: {"error": {...}}``, whatever form the server uses, because clients recognise no other.

    Args:
        upstream: the server.
        name: the engine's name.
        state: the engine's state; its running and waiting requests are counted here, unless the server reports them.
        api_key: the server's own key.
        connections: maximum requests in flight: (requests that generate tokens, all other requests).
        see_first_token: request non-streaming completions as streams.
        send_slo: send the SLO to the server.
        on_unreachable: called when no connection could be established.
        on_broken: called when a connection broke.
        on_unauthorized: called when the server rejected the key.

    Attributes:
        last_data_at: when the server last sent something (monotonic s).
        sequences: sequences of the requests that the server has.

    Raises:
        EngineUnreachable: no connection to the server was established. ``on_unreachable`` is called first.
        EngineLost: the connection broke, or the stream ended too early. ``on_broken`` is called first.
    """

    def __init__(
        self,
        *,
        upstream: Upstream,
        name: str,
        state: EngineState,
        api_key: str | None,
        connections: tuple[int, int],
        see_first_token: bool,
        send_slo: bool,
        on_unreachable: Callable[[], None],
        on_broken: Callable[[], None],
        on_unauthorized: Callable[[], None],
    ) -> None:
        self.events = EngineEvents()
        self.last_data_at = 0.0
        self._upstream = upstream
        self._name = name
        self._state = state
        self._api_key = api_key
        self._generating, self._others = map(Slots, connections)
        self._see_first_token = see_first_token
        self._send_slo = send_slo
        self._on_unreachable = on_unreachable
        self._on_broken = on_broken
        self._on_unauthorized = on_unauthorized
        self._sampler = StepSampler(state)
        self._usage_unsupported = self._queue_is_reported = False
        self.sequences = 0
        self._log_lost_at, self._running, self._waiting = 0.0, 0, 0

    def set_reported(self, *, steps: bool, queue: bool) -> None:
        """Say what the server reports itself: its steps, its queue. What it does not report is estimated here."""
        self._sampler.learns = not steps
        self._queue_is_reported = queue
        self._show_queue()

    def _show_queue(self) -> None:
        if not self._queue_is_reported:
            self._state.engine_running, self._state.engine_waiting = self._running, self._waiting

    def is_silent(self, progress_at: float | None) -> bool:
        """Whether the server sends nothing, and for longer than its streams explain. Call it regularly.

        ``progress_at``: when it last reported that it computed something (monotonic s); None if it does not report.
        """
        silent_s, limit_s = self._upstream.silent_s(), self._sampler.silence_limit_s(progress_at is not None)
        return silent_s > limit_s and (progress_at is None or time.monotonic() - progress_at > limit_s)

    def __call__(self, scope: Scope, receive: Receive, send: Send) -> Awaitable[None]:
        """Serve one request. A caller that passes a parsed body cancels this when the client disconnects."""
        body: JsonBody | None = scope.get(BODY_KEY)
        if body is None:
            return self._serve_unparsed(scope, receive, send)
        # NOTE: a coroutine less for each event to pass through.
        return self._serve(scope, body.take_document(), b"", send)

    async def _serve_unparsed(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return
        try:
            raw = await read_body(receive)
        except ClientDisconnected:
            return
        await run_until_disconnect(self._serve(scope, None, raw, send), receive)

    async def _serve(self, scope: Scope, document: dict[str, Any] | None, raw: bytes, send: Send) -> None:
        plan = self._plan(scope, document, raw)
        request = ClientRequest(scope, plan, scope.get(OBSERVER_KEY) or NullObserver(), send)
        connections = self._others if plan is None else self._generating
        if not connections.try_take():
            await self._wait_for(connections)
        sequences = 1 if plan is None else plan.sequences
        self._running += 1
        self.sequences += sequences
        self._show_queue()
        try:
            if plan is None:
                raw = raw if document is None else encode_json(document)
                with await self._response(scope, raw) as response:
                    await self._relay(request, response)
            else:
                await self._complete(request, plan)
        except BadUpstreamError as error:
            log.warning("%s %s", self._upstream.where, error)
            counter = CompletionCounter if plan is None else plan.counter
            message = f"The engine {self._name} {error}."
            fields = {"message": message, "type": "engine_error", "param": None, "code": "bad_gateway"}
            await request.send_json(502, orjson.dumps(counter.error_document(fields)))
        except EngineUnreachable:
            self._on_unreachable()
            raise
        except EngineLost as error:
            if time.monotonic() >= self._log_lost_at:
                self._log_lost_at = time.monotonic() + LOST_LOGGED_S
                log.warning("lost a response: %s", error)
            self._on_broken()
            raise
        finally:
            self._running -= 1
            self.sequences -= sequences
            self._show_queue()
            connections.give_back()

    def _plan(self, scope: Scope, document: dict[str, Any] | None, raw: bytes) -> CompletionPlan | None:
        counter = counter_for(scope["path"]) if scope["method"] == "POST" else None
        if counter is None:
            return None
        document = parse_completion(raw) if document is None else document
        if document is None:
            return None
        ask_usage = not self._usage_unsupported
        return CompletionPlan.make(document, self._see_first_token, ask_usage, self._send_slo, counter)

    async def _wait_for(self, connections: Slots) -> None:
        """Wait for one of ``connections``. Meanwhile, the request counts as waiting."""
        self._waiting += 1
        self._show_queue()
        try:
            async with asyncio.timeout(self._upstream.head_timeout_s):
                await connections.wait()
        except TimeoutError:
            raise EngineLost(f"{self._upstream.where}: no connection became free") from None
        finally:
            self._waiting -= 1
            self._show_queue()

    async def _complete(self, request: ClientRequest, plan: CompletionPlan) -> None:
        content = plan.encoded()
        prompt_tokens = len(content) / BYTES_PER_TOKEN
        timing = self._sampler.sent(time.monotonic(), prompt_tokens, plan.sequences, plan.tpot_ms, plan.may_pause)
        counter = plan.counter(request.observer, plan.sequences)
        if not plan.streams:
            request.observer.on_unobserved()
        try:
            while True:
                with await self._response(request.scope, content) as response:
                    if not (plan.is_altered and response.status in _MAY_REJECT):
                        self._usage_unsupported |= plan.usage_was_rejected and response.status < 400
                        await self._forward(request, plan, response, counter, timing)
                        return
                    error = await response.read_all()
                    if not plan.gives_up(response.status, error):
                        await self._relay(request, response, error)
                        return
                content = plan.encoded()
                if not plan.streams:
                    request.observer.on_unobserved()
        finally:
            counter.settle()
            computed = counter.usage.computed if counter.usage is not None and plan.sequences == 1 else None
            if self._sampler.finished(timing, computed):
                self.events.on_step()

    async def _forward(
        self,
        request: ClientRequest,
        plan: CompletionPlan,
        response: Response,
        counter: TokenCounter,
        timing: StreamTiming,
    ) -> None:
        """Forward the response to a request that generates tokens, and count them."""
        if not 200 <= response.status < 300:
            await self._relay(request, response)
            return
        encoding = response.header(b"content-encoding")
        if encoding not in READABLE_ENCODINGS:
            raise BadUpstreamError(f"compressed its response ({encoding[:20]}), which the request does not accept")
        if not response.header(b"content-type").startswith("text/event-stream"):
            # Also if a stream was asked for: some servers ignore that.
            await self._relay_document(request, response, counter)
            return
        on_read = partial(self._on_read, response, counter, timing)
        if plan.rewritten and isinstance(counter, CompletionCounter):
            status, data = await assembled(response, counter, on_read)
            await request.send_json(status, data, downstream_headers(response.headers, altered=True))
        else:
            await self._stream(request, plan, response, counter, on_read)
        response.close_after_last_bytes()

    def _on_read(self, response: Response, counter: TokenCounter, timing: StreamTiming, tokens: int) -> None:
        self.last_data_at = at = response.read_at
        if tokens > 0:
            per_event = 1.0 if counter.settled else counter.tokens_per_event
            if self._sampler.tokens(timing, tokens * per_event, at):
                self.events.on_step()

    async def _stream(
        self,
        request: ClientRequest,
        plan: CompletionPlan,
        response: Response,
        counter: TokenCounter,
        on_read: Callable[[int], None],
    ) -> None:
        await request.send_head(response, altered=True)
        hidden = EventKind.USAGE if plan.asked_usage else None
        reader = EventReader(response, counter, counter.see_all, on_read, request.pass_event)
        while batch := await reader.next():
            if not counter.ended and len(batch) == 1:
                kind, event = batch[0]
                if kind is not hidden:
                    await request.send({"type": "http.response.body", "body": event, "more_body": True})
                continue
            last = batch.pop() if counter.ended else None
            kept = [event for kind, event in batch if kind is not hidden]
            if last is not None and last[1] in USUAL_DONE:
                kept.append(last[1])
                last = None
            if kept:
                ended = counter.ended and last is None
                await request.send_body(b"".join(kept), more=not ended)
                if ended:
                    return
            if last is not None:
                await request.send_last(*last, counter)
        await request.send_body(b"", more=False)

    async def _relay(self, request: ClientRequest, response: Response, first: bytes = b"") -> None:
        """Forward a response unchanged. ``first``: what was read of its body."""
        if not first and response.status >= 500 and request.scope["method"] != "HEAD":
            first = await response.read()
            if not first and response.status != 503:
                raise EngineLost(f"{self._upstream.where}: {response.status} with no body")
        await request.send_head(response, altered=False)
        if first:
            await request.send_body(first, more=True)
        await self._send_rest(request, response.read)

    async def _send_rest(self, request: ClientRequest, read: Callable[[], Awaitable[bytes]]) -> None:
        while chunk := await read():
            self.last_data_at = time.monotonic()
            await request.send_body(chunk, more=True)
        await request.send_body(b"", more=False)

    async def _relay_document(self, request: ClientRequest, response: Response, counter: TokenCounter) -> None:
        """Forward a JSON response unchanged once it is complete, and count its tokens.

        An error in a document with status 200 gets an error status. A response object that says that it failed keeps
        its status, because the client can read that there.
        """
        data, read = bytearray(), response.plain_reader()
        while chunk := await read():
            self.last_data_at = time.monotonic()
            data += chunk
            if len(data) > LARGEST_PARSED:
                break
        else:
            await self._send_document(request, response, bytes(data), counter)
            return
        await request.send_head(response, altered=True)
        await request.send_body(bytes(data), more=True)
        await self._send_rest(request, read)

    async def _send_document(
        self, request: ClientRequest, response: Response, data: bytes, counter: TokenCounter
    ) -> None:
        document = parse_data(data)
        if document is None:
            raise BadUpstreamError(f"answered with status {response.status} and a body that is not a JSON object")
        counter.see_document(document, time.monotonic())
        headers = downstream_headers(response.headers, altered=True)
        if counter.error is None:
            await request.send_json(200, data, headers)
        elif document.get("object") == "response":
            kept = [*headers, (b"content-length", b"%d" % len(data))]
            await request.send({"type": "http.response.start", "status": 200, "headers": kept})
            await request.send_failure(data, more=False)
        else:
            status, body = error_status(counter.error), counter.error_document(counter.error)
            await request.send_json(status, data if "error" in document else orjson.dumps(body), headers)

    async def _response(self, scope: Scope, content: bytes) -> Response:
        """The upstream response with an unread body.

        Raises `BadUpstreamError` for a redirect and for an HTML page that claims success.
        """
        headers = upstream_headers(scope["headers"], self._api_key, self._send_slo)
        response = await self._upstream.send(scope["method"], target(scope), headers, content)
        self.last_data_at = response.read_at
        try:
            self._check(response, scope["method"])
        except BaseException:
            response.close()
            raise
        return response

    def _check(self, response: Response, method: str) -> None:
        if 300 <= response.status < 400 and response.status != 304:
            raise BadUpstreamError(f"answered with a redirect ({response.status}): set its base_url to the target")
        # A file that a GET asks for may be a page.
        is_page = method == "POST" and response.header(b"content-type").startswith("text/html")
        if is_page and 200 <= response.status < 300:
            raise BadUpstreamError("answered with an HTML page: check its base_url")
        if response.status in (401, 403):
            self._on_unauthorized()
