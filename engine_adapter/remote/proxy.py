"""The reverse proxy behind `HttpEngine`: a request out, its answer back, tokens counted on the way."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote

import aiohttp
import orjson

from engine_adapter.asgi import ClientDisconnected, read_document_or_body, run_until_disconnect
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
"""A first guess at a prompt's tokens, until the server's usage says how many there were."""
LARGEST_PARSED = 8 << 20
"""Bytes of a plain answer beyond which its usage is not looked for."""


class _Unobserved:
    def on_prompt(self, sequence: str, tokens: int) -> None: ...

    def on_tokens(self, sequence: str, count: int, at: float) -> None: ...

    def on_unobserved(self) -> None: ...


@dataclass(slots=True)
class _Exchange:
    """One request: where its answer goes, and who is told of its tokens. ``plan``: only for completions."""

    scope: Scope
    plan: CompletionPlan | None
    observer: TokenObserver
    send: Send

    async def head(self, response: aiohttp.ClientResponse, altered: bool) -> None:
        headers = downstream_headers(response.raw_headers, altered)
        await self.send({"type": "http.response.start", "status": response.status, "headers": headers})

    async def body(self, data: bytes, more: bool) -> None:
        await self.send({"type": "http.response.body", "body": data, "more_body": more})


class HttpProxy:
    """ASGI app over an `Upstream`. Raises `EngineUnreachable` when no connection to the server comes about, and
    `EngineLost` when it breaks off; of either somebody is told first (``on_unreachable``, ``on_broken``).

    An answer of the server, whatever its status, is passed on, but for a 5xx with nothing in it: that is a
    dying server, or a load balancer in front of a dead one. 429 and 503 always pass: the server lives and
    says "later".
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
        self._usage_refused = False

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
                plan = CompletionPlan.make(document, self._see_first_token, not self._usage_refused, self._send_slo)
        exchange = _Exchange(scope, plan, scope.get(OBSERVER_KEY) or _Unobserved(), send)
        try:
            if plan is None:
                async with self._answer(scope, raw) as response:
                    await self._relay(exchange, response, response.content.iter_any())
            else:
                await self._complete(exchange, plan)
        except EngineUnreachable:
            self._on_unreachable()
            raise
        except EngineLost:
            self._on_broken()
            raise

    async def _complete(self, exchange: _Exchange, plan: CompletionPlan) -> None:
        content = plan.encoded()
        timing = self._sampler.sent(time.monotonic(), len(content) / BYTES_PER_TOKEN, plan.sequences, plan.tpot_ms)
        usage: dict[str, Any] = {}
        if not plan.streams:
            exchange.observer.on_unobserved()
        try:
            async with self._answer(exchange.scope, content) as response:
                if not (plan.asked_usage and response.status in (400, 422)):
                    usage = await self._pass_on(exchange, plan, response, timing)
                    return
                refusal = await response.read()
                if b"stream_options" not in refusal and b"include_usage" not in refusal:
                    await self._relay(exchange, response, _only(refusal))
                    return
            plan.without_usage()
            async with self._answer(exchange.scope, plan.encoded()) as response:
                self._usage_refused |= response.status < 400
                usage = await self._pass_on(exchange, plan, response, timing)
        finally:
            computed = _computed_prompt(usage) if plan.sequences == 1 else None
            if self._sampler.finished(timing, computed):
                self.events.on_step()

    async def _pass_on(
        self, exchange: _Exchange, plan: CompletionPlan, response: aiohttp.ClientResponse, timing: StreamTiming
    ) -> dict[str, Any]:
        """Hand a completion's answer to the client. Returns its usage, empty when none was seen."""
        is_stream = response.headers.get("content-type", "").startswith("text/event-stream")
        if response.status != 200 or (plan.streams and not is_stream):
            await self._relay(exchange, response, response.content.iter_any())
            return {}
        if not plan.streams:
            return await self._relay_plain(exchange, response)
        counter = TokenCounter(exchange.observer, several=plan.sequences > 1)
        events = self._events(response, counter, timing)
        try:
            await (self._assemble if plan.rewritten else self._stream)(exchange, plan, response, events)
        finally:
            # Left open, the generator would keep reading rights on the connection until garbage collection.
            await events.aclose()
            counter.settle()
        return counter.usage or {}

    async def _events(
        self, response: aiohttp.ClientResponse, counter: TokenCounter, timing: StreamTiming
    ) -> AsyncGenerator[list[tuple[EventKind, bytes]], None]:
        """The stream's events as the network delivers them, counted."""
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
        exchange: _Exchange,
        plan: CompletionPlan,
        response: aiohttp.ClientResponse,
        events: AsyncIterator[list[tuple[EventKind, bytes]]],
    ) -> None:
        await exchange.head(response, altered=True)
        async for read in events:
            kept = [event for kind, event in read if not (plan.asked_usage and kind is EventKind.USAGE)]
            if kept:
                await exchange.body(b"".join(kept), more=True)
        await exchange.body(b"", more=False)

    async def _assemble(
        self,
        exchange: _Exchange,
        plan: CompletionPlan,
        response: aiohttp.ClientResponse,
        events: AsyncIterator[list[tuple[EventKind, bytes]]],
    ) -> None:
        assembler = Assembler()
        async for read in events:
            for _, event in read:
                assembler.add(event)
        if not assembler.complete:
            raise EngineLost(f"{self._upstream.where}: its stream ended before the answer did")
        status, body = assembler.response()
        data = orjson.dumps(body)
        headers = downstream_headers(response.raw_headers, altered=True)
        headers = [(name, value) for name, value in headers if name != b"content-type"]
        headers += [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(data))]
        await exchange.send({"type": "http.response.start", "status": status, "headers": headers})
        await exchange.body(data, more=False)

    async def _relay(self, exchange: _Exchange, response: aiohttp.ClientResponse, chunks: AsyncIterator[bytes]) -> None:
        """Pass an answer on byte by byte."""
        first = b""
        if response.status >= 500 and exchange.scope["method"] != "HEAD":
            first = await anext(chunks, b"")
            if not first and response.status != 503:
                raise EngineLost(f"{self._upstream.where}: {response.status} with no body")
        await exchange.head(response, altered=False)
        if first:
            await exchange.body(first, more=True)
        async for chunk in chunks:
            await exchange.body(chunk, more=True)
        await exchange.body(b"", more=False)

    async def _relay_plain(self, exchange: _Exchange, response: aiohttp.ClientResponse) -> dict[str, Any]:
        """Pass a plain completion on. Its tokens are told when it is complete: none was seen earlier."""
        await exchange.head(response, altered=False)
        copy = bytearray()
        async for chunk in response.content.iter_any():
            if len(copy) < LARGEST_PARSED:
                copy += chunk
            await exchange.body(chunk, more=True)
        usage = _plain_usage(bytes(copy))
        if isinstance(usage.get("prompt_tokens"), int):
            exchange.observer.on_prompt("0", usage["prompt_tokens"])
        if isinstance(usage.get("completion_tokens"), int) and usage["completion_tokens"] > 0:
            exchange.observer.on_tokens("0", usage["completion_tokens"], time.monotonic())
        await exchange.body(b"", more=False)
        return usage

    def _answer(self, scope: Scope, content: bytes) -> AbstractAsyncContextManager[aiohttp.ClientResponse]:
        """The upstream's answer, its body still unread; leaving closes it, which stops its generation."""
        headers = upstream_headers(scope["headers"], self._api_key, self._send_slo)
        return self._upstream.answer(scope["method"], _target(scope), headers, content)


def _target(scope: Scope) -> bytes:
    """The request's raw path and query, without the place where the gateway is mounted."""
    path: bytes = scope.get("raw_path") or quote(scope["path"]).encode()
    query: bytes = scope["query_string"]
    path = path.removeprefix(scope.get("root_path", "").encode())
    return path + b"?" + query if query else path


async def _only(data: bytes) -> AsyncIterator[bytes]:
    yield data


def _computed_prompt(usage: dict[str, Any]) -> int | None:
    """Prompt tokens that the server computed: all but those it found in its prefix cache."""
    prompt, details = usage.get("prompt_tokens"), usage.get("prompt_tokens_details")
    cached = details.get("cached_tokens") if isinstance(details, dict) else None
    return prompt - (cached or 0) if isinstance(prompt, int) else None


def _plain_usage(body: bytes) -> dict[str, Any]:
    try:
        usage = orjson.loads(body).get("usage")
    except (orjson.JSONDecodeError, AttributeError):
        return {}
    return usage if isinstance(usage, dict) else {}
