"""The reverse proxy behind `HttpEngine`. It forwards requests and responses and counts output tokens."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote

import aiohttp
import orjson

from engine_adapter.asgi import ClientDisconnected, encode_json, read_document_or_body, run_until_disconnect
from engine_adapter.engine import (
    OBSERVER_KEY,
    EngineEvents,
    EngineLost,
    EngineState,
    EngineUnreachable,
    Receive,
    Scope,
    Send,
    TokenObserver,
)
from engine_adapter.remote.assemble import Assembler
from engine_adapter.remote.client import Upstream, plain_chunks
from engine_adapter.remote.request import (
    COMPLETION_PATHS,
    CompletionPlan,
    downstream_headers,
    parse_completion,
    upstream_headers,
)
from engine_adapter.remote.sse import EventKind, SSESplitter, TokenCounter
from engine_adapter.remote.step_samples import StepSampler, StreamTiming

BYTES_PER_TOKEN = 4
"""Bytes of request body per prompt token: an estimate that holds until the server reports its usage."""
LARGEST_PARSED = 8 << 20
"""Largest non-streaming response (bytes) that is parsed for its usage. Bounds the memory of the copy."""


class _NullObserver:
    def on_prompt(self, sequence: str, tokens: int) -> None: ...

    def on_cached(self, sequence: str, tokens: int) -> None: ...

    def on_tokens(self, sequence: str, count: int, at: float) -> None: ...

    def on_unobserved(self) -> None: ...


@dataclass(slots=True)
class _ClientRequest:
    """One client request and the channel for its response. ``plan`` is None unless it is a completion."""

    scope: Scope
    plan: CompletionPlan | None
    observer: TokenObserver
    send: Send

    async def send_head(self, response: aiohttp.ClientResponse, altered: bool) -> None:
        headers = downstream_headers(response.raw_headers, altered)
        await self.send({"type": "http.response.start", "status": response.status, "headers": headers})

    async def send_body(self, data: bytes, more: bool) -> None:
        await self.send({"type": "http.response.body", "body": data, "more_body": more})


class HttpProxy:
    """ASGI app over an `Upstream`.

    It forwards every server response, whatever its status, except a 5xx without a body. That one comes from a dying
    server, or from a load balancer in front of a dead one. It always forwards 429 and 503: the server is alive
    and asks the client to retry later.

    Raises:
        EngineUnreachable: no connection to the server was established. ``on_unreachable`` is called first.
        EngineLost: the connection broke. ``on_broken`` is called first.
    """

    def __init__(
        self,
        *,
        upstream: Upstream,
        state: EngineState,
        api_key: str | None,
        see_first_token: bool,
        send_slo: bool,
        on_unreachable: Callable[[], None],
        on_broken: Callable[[], None],
    ) -> None:
        self.events = EngineEvents()
        self._upstream = upstream
        self._state = state
        self._api_key = api_key
        self._see_first_token = see_first_token
        self._send_slo = send_slo
        self._on_unreachable = on_unreachable
        self._on_broken = on_broken
        self._sampler = StepSampler(state)
        self._usage_unsupported = False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        if scope["type"] != "http":
            return
        try:
            document, raw = await read_document_or_body(scope, receive)
        except ClientDisconnected:
            return
        self._state.engine_running += 1
        try:
            await run_until_disconnect(self._serve(scope, document, raw, send), receive)
        finally:
            self._state.engine_running -= 1

    async def _serve(self, scope: Scope, document: dict[str, Any] | None, raw: bytes, send: Send) -> None:
        plan = None
        if scope["method"] == "POST" and scope["path"].endswith(COMPLETION_PATHS):
            document = parse_completion(raw) if document is None else document
            if document is not None:
                plan = CompletionPlan.make(document, self._see_first_token, not self._usage_unsupported, self._send_slo)
        request = _ClientRequest(scope, plan, scope.get(OBSERVER_KEY) or _NullObserver(), send)
        try:
            if plan is None:
                raw = raw if document is None else encode_json(document)
                async with self._open_response(scope, raw) as response:
                    await self._relay(request, response, response.content.iter_any())
            else:
                await self._complete(request, plan)
        except EngineUnreachable:
            self._on_unreachable()
            raise
        except EngineLost:
            self._on_broken()
            raise

    async def _complete(self, request: _ClientRequest, plan: CompletionPlan) -> None:
        content = plan.encoded()
        timing = self._sampler.sent(time.monotonic(), len(content) / BYTES_PER_TOKEN, plan.sequences, plan.tpot_ms)
        usage: dict[str, Any] = {}
        if not plan.streams:
            request.observer.on_unobserved()
        try:
            async with self._open_response(request.scope, content) as response:
                if not (plan.asked_usage and response.status in (400, 422)):
                    usage = await self._forward_completion(request, plan, response, timing)
                    return
                error = await response.read()
                if b"stream_options" not in error and b"include_usage" not in error:
                    await self._relay(request, response, _single_chunk(error))
                    return
            plan.without_usage()
            async with self._open_response(request.scope, plan.encoded()) as response:
                self._usage_unsupported |= response.status < 400
                usage = await self._forward_completion(request, plan, response, timing)
        finally:
            computed = _computed_prompt_tokens(usage) if plan.sequences == 1 else None
            if self._sampler.finished(timing, computed):
                self.events.on_step()

    async def _forward_completion(
        self, request: _ClientRequest, plan: CompletionPlan, response: aiohttp.ClientResponse, timing: StreamTiming
    ) -> dict[str, Any]:
        """Forward a completion's response to the client. Returns its usage; empty if the server reported none."""
        is_stream = response.headers.get("content-type", "").startswith("text/event-stream")
        if response.status != 200 or (plan.streams and not is_stream):
            await self._relay(request, response, response.content.iter_any())
            return {}
        if not plan.streams:
            return await self._relay_plain(request, response)
        counter = TokenCounter(request.observer, several=plan.sequences > 1)
        events = self._events(response, counter, timing)
        try:
            await (self._assemble if plan.rewritten else self._stream)(request, plan, response, events)
        finally:
            # An open generator would stay the connection's reader until garbage collection.
            await events.aclose()
            counter.settle()
        return counter.usage or {}

    async def _events(
        self, response: aiohttp.ClientResponse, counter: TokenCounter, timing: StreamTiming
    ) -> AsyncGenerator[list[tuple[EventKind, bytes]], None]:
        """Yield the stream's events with their kinds, one list per network read, and count their tokens."""
        splitter = SSESplitter()
        async for chunk in plain_chunks(response):
            at, before = time.monotonic(), counter.total
            events = [(counter.see(event, at), event) for event in splitter.feed(chunk)]
            if self._sampler.tokens(timing, counter.total - before, at):
                self.events.on_step()
            if events:
                yield events
        if splitter.rest:
            yield [(counter.see(splitter.rest, time.monotonic()), splitter.rest)]

    async def _stream(
        self,
        request: _ClientRequest,
        plan: CompletionPlan,
        response: aiohttp.ClientResponse,
        events: AsyncIterator[list[tuple[EventKind, bytes]]],
    ) -> None:
        await request.send_head(response, altered=True)
        async for batch in events:
            kept = [event for kind, event in batch if not (plan.asked_usage and kind is EventKind.USAGE)]
            if kept:
                await request.send_body(b"".join(kept), more=True)
        await request.send_body(b"", more=False)

    async def _assemble(
        self,
        request: _ClientRequest,
        plan: CompletionPlan,
        response: aiohttp.ClientResponse,
        events: AsyncIterator[list[tuple[EventKind, bytes]]],
    ) -> None:
        assembler = Assembler()
        async for batch in events:
            for _, event in batch:
                assembler.add(event)
        if not assembler.complete:
            raise EngineLost(f"{self._upstream.where}: the stream ended before the response was complete")
        status, body = assembler.response()
        data = orjson.dumps(body)
        headers = downstream_headers(response.raw_headers, altered=True)
        headers = [(name, value) for name, value in headers if name != b"content-type"]
        headers += [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(data))]
        await request.send({"type": "http.response.start", "status": status, "headers": headers})
        await request.send_body(data, more=False)

    async def _relay(
        self, request: _ClientRequest, response: aiohttp.ClientResponse, chunks: AsyncIterator[bytes]
    ) -> None:
        """Forward a response unchanged."""
        first = b""
        if response.status >= 500 and request.scope["method"] != "HEAD":
            first = await anext(chunks, b"")
            if not first and response.status != 503:
                raise EngineLost(f"{self._upstream.where}: {response.status} with no body")
        await request.send_head(response, altered=False)
        if first:
            await request.send_body(first, more=True)
        async for chunk in chunks:
            await request.send_body(chunk, more=True)
        await request.send_body(b"", more=False)

    async def _relay_plain(self, request: _ClientRequest, response: aiohttp.ClientResponse) -> dict[str, Any]:
        """Forward a non-streaming completion. Reports its tokens once it is complete. Returns its usage."""
        await request.send_head(response, altered=False)
        copy = bytearray()
        async for chunk in response.content.iter_any():
            if len(copy) < LARGEST_PARSED:
                copy += chunk
            await request.send_body(chunk, more=True)
        usage = _plain_usage(bytes(copy))
        if isinstance(usage.get("prompt_tokens"), int):
            request.observer.on_prompt("0", usage["prompt_tokens"])
        if isinstance(usage.get("completion_tokens"), int) and usage["completion_tokens"] > 0:
            request.observer.on_tokens("0", usage["completion_tokens"], time.monotonic())
        await request.send_body(b"", more=False)
        return usage

    def _open_response(self, scope: Scope, content: bytes) -> AbstractAsyncContextManager[aiohttp.ClientResponse]:
        """The upstream response with an unread body. Leaving the context closes it, which stops its generation."""
        headers = upstream_headers(scope["headers"], self._api_key, self._send_slo)
        return self._upstream.answer(scope["method"], _target(scope), headers, content)


def _target(scope: Scope) -> bytes:
    """The request's raw path and query, without the prefix under which the gateway is mounted."""
    path: bytes = scope.get("raw_path") or quote(scope["path"]).encode()
    query: bytes = scope["query_string"]
    path = path.removeprefix(scope.get("root_path", "").encode())
    return path + b"?" + query if query else path


async def _single_chunk(data: bytes) -> AsyncIterator[bytes]:
    yield data


def _computed_prompt_tokens(usage: dict[str, Any]) -> int | None:
    """Prompt tokens that the server computed, that is, without prefix-cache hits."""
    prompt, details = usage.get("prompt_tokens"), usage.get("prompt_tokens_details")
    cached = details.get("cached_tokens") if isinstance(details, dict) else None
    return prompt - (cached or 0) if isinstance(prompt, int) else None


def _plain_usage(body: bytes) -> dict[str, Any]:
    try:
        usage = orjson.loads(body).get("usage")
    except (orjson.JSONDecodeError, AttributeError):
        return {}
    return usage if isinstance(usage, dict) else {}
