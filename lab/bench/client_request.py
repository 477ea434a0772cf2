"""One request of the load client: send it, time its stream, and determine its outcome.

Tokens in an event stream are counted as in the gateway (`engine_adapter.remote.counting`).
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from typing import Any

import aiohttp
import orjson

from engine_adapter.remote.counting.completions import CompletionCounter
from engine_adapter.remote.counting.token_counter import EventKind
from engine_adapter.remote.sse import EventTooLarge, SSESplitter
from engine_adapter.remote.usage import Usage
from gateway.requests.progress import tpot
from lab.records.run_record import Outcome
from lab.workload import WorkloadRequest

UNREACHABLE = "unreachable"
"""Prefix of the reason when no connection could be opened."""


@dataclass(slots=True)
class ClientResult:
    """Outcome of one request, in the form that the client process sends to its parent; see `RequestResult`.

    Times are in seconds from the due time.

    Attributes:
        tokens: output tokens of the answer.
        from_usage: whether ``tokens`` is from the server's ``usage``.
        prompt_tokens, cached_tokens: the prompt and its prefix-cache hit, by the server's ``usage``; 0 if unknown.
    """

    outcome: Outcome = "failed"
    reason: str = ""
    late_s: float = 0.0
    ttft_s: float | None = None
    tpot_s: float = 0.0
    e2e_s: float | None = None
    tokens: int = 0
    from_usage: bool = False
    prompt_tokens: int = 0
    cached_tokens: int = 0


class _Stream:
    """Times of the first and last token of one answer, as an `engine_adapter.engine.TokenObserver`."""

    def __init__(self) -> None:
        self.first: float | None = None
        self.last = 0.0
        self.done = False
        self.error: str | None = None
        self.counter = CompletionCounter(self)
        self._events = SSESplitter()

    def on_prompt(self, sequence: str, tokens: int) -> None:
        """Ignored: the client does not need the prompt size."""

    def on_cached(self, sequence: str, tokens: int) -> None:
        """Ignored: the client does not need the cache hit."""

    def on_tokens(self, sequence: str, count: int, at: float) -> None:
        """Record the time of new tokens."""
        if self.first is None:
            self.first = at
        self.last = at

    def on_unobserved(self) -> None:
        """Ignored: the client reads the stream itself."""

    def feed(self, data: bytes, at: float) -> None:
        """Parse bytes that arrived at ``at`` (monotonic s)."""
        for event in self._events.feed(data):
            kind = self.counter.see(event, at)
            if kind is EventKind.DONE:
                self.done = True
            elif kind is EventKind.ERROR:
                self.error = _message({"error": self.counter.error})


async def send_request(
    session: aiohttp.ClientSession,
    path: str,
    request: WorkloadRequest,
    body: bytes,
    due: float,
    result: ClientResult,
    *,
    exact_length: bool,
) -> None:
    """Post ``body`` and fill in ``result``. Errors are not raised; they become the reason of a failed result.

    ``due`` is the due time (monotonic s). ``exact_length`` tells that the request asks for an exact output length
    (``ignore_eos``).
    """
    result.late_s = time.monotonic() - due
    bounds = {"ttft": request.ttft_slo_s, "tpot": request.tpot_slo_s, "e2e": request.e2e_slo_s}
    headers = {f"x-slo-{name}-ms": f"{bound * 1000:g}" for name, bound in bounds.items() if bound < math.inf}
    stream = _Stream()
    try:
        async with session.post(path, data=body, headers=headers) as response:
            if response.status != 200:
                _record_error(result, response.status, await response.read())
                return
            async for data in response.content.iter_any():
                stream.feed(data, time.monotonic())
    except aiohttp.ClientConnectorError as error:
        result.reason = f"{UNREACHABLE}: {error.strerror or error}"
    except aiohttp.ConnectionTimeoutError:
        result.reason = f"{UNREACHABLE}: connection timed out"
    except TimeoutError:
        result.reason = "timed out"
    except EventTooLarge:
        result.reason = "the answer has an event that never ends"
    except (aiohttp.ClientError, OSError) as error:
        result.reason = f"connection lost: {type(error).__name__}"
    _record_stream(stream, result, request, due, exact_length)


def _record_error(result: ClientResult, status: int, body: bytes) -> None:
    """Fill in ``result`` from an error response: 429 is a rejection, any other status a failure."""
    try:
        document = orjson.loads(body)
    except orjson.JSONDecodeError:
        document = None
    if status == 429:
        error = document.get("error") if isinstance(document, dict) else None
        result.outcome = "rejected"
        result.reason = str((error.get("code") if isinstance(error, dict) else None) or "HTTP 429")
    else:
        message = _message(document) if isinstance(document, dict) else body[:200].decode(errors="replace")
        result.reason = f"HTTP {status}: {message}"


def _message(body: dict[str, Any]) -> str:
    error = body.get("error", body)
    message = error.get("message", error) if isinstance(error, dict) else error
    return str(message)[:200]


def _record_stream(
    stream: _Stream, result: ClientResult, request: WorkloadRequest, due: float, exact_length: bool
) -> None:
    """Fill in ``result`` from a stream that has ended."""
    if stream.first is not None:
        usage = stream.counter.usage or Usage()
        stated = usage.completion
        result.prompt_tokens, result.cached_tokens = usage.prompt or 0, usage.cached or 0
        result.from_usage = stated is not None
        # Without usage, the total is the number of events, or an estimate from the text if they hold several tokens. An
        # exact length that the request asked for is a better estimate.
        estimated = request.output_tokens if exact_length and stream.done else stream.counter.total
        result.tokens = estimated if stated is None else stated
        result.ttft_s = stream.first - due
        result.tpot_s = tpot(stream.first, stream.last, result.tokens)
    if result.reason:
        return
    if stream.error is not None:
        result.reason = stream.error
    elif not stream.done:
        result.reason = "the stream ended without [DONE]"
    elif stream.first is None:
        result.reason = "the answer has no tokens"
    else:
        result.outcome = "finished"
        result.e2e_s = stream.last - due
