"""One request of the load client: sent, timed, and judged from what came back.

What counts as a token in an event stream is what the gateway counts (`engine_adapter.remote.sse`).
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from typing import Any

import aiohttp
import orjson

from engine_adapter.remote.sse import EventKind, SSESplitter, TokenCounter, parse_event
from gateway.requests.progress import tpot
from lab.records.run_record import Outcome
from lab.workload import WorkloadRequest

UNREACHABLE = "unreachable"
"""How the reason begins when no connection came about."""


@dataclass(slots=True)
class ClientResult:
    """What one request came to; `RequestResult`, as it travels from the client's process. Times in seconds from the
    due time.

    ``tokens`` is the answer's length; ``from_usage`` says that the server stated it.
    """

    outcome: Outcome = "failed"
    reason: str = ""
    late_s: float = 0.0
    ttft_s: float | None = None
    tpot_s: float = 0.0
    e2e_s: float | None = None
    tokens: int = 0
    from_usage: bool = False


class _Stream:
    """Implements `engine_adapter.engine.TokenObserver` for one answer: when tokens came."""

    def __init__(self) -> None:
        self.first: float | None = None
        self.last = 0.0
        self.done = False
        self.error: str | None = None
        self.counter = TokenCounter(self)
        self._events = SSESplitter()

    def on_prompt(self, sequence: str, tokens: int) -> None:
        """Not of interest here."""

    def on_tokens(self, sequence: str, count: int, at: float) -> None:
        """New tokens."""
        if self.first is None:
            self.first = at
        self.last = at

    def on_unobserved(self) -> None:
        """A client sees for itself."""

    def feed(self, data: bytes, at: float) -> None:
        """Bytes that arrived at ``at`` (monotonic s)."""
        for event in self._events.feed(data):
            kind = self.counter.see(event, at)
            if kind is EventKind.DONE:
                self.done = True
            elif kind is EventKind.OTHER and b'"error"' in event:
                chunk = parse_event(event)
                if chunk is not None and chunk.get("error"):
                    self.error = _message(chunk)


async def ask(
    session: aiohttp.ClientSession,
    path: str,
    asked: WorkloadRequest,
    body: bytes,
    due: float,
    answer: ClientResult,
    *,
    exact_length: bool,
) -> None:
    """Post ``body``, due at ``due`` (monotonic s), and fill in ``answer``; whatever goes wrong becomes its reason.

    ``exact_length`` says that the server was told to write exactly as many tokens as were asked for.
    """
    answer.late_s = time.monotonic() - due
    bounds = {"ttft": asked.ttft_slo_s, "tpot": asked.tpot_slo_s, "e2e": asked.e2e_slo_s}
    headers = {f"x-slo-{name}-ms": f"{bound * 1000:g}" for name, bound in bounds.items() if bound < math.inf}
    stream = _Stream()
    try:
        async with session.post(path, data=body, headers=headers) as response:
            if response.status != 200:
                _refused(answer, response.status, await response.read())
                return
            async for data in response.content.iter_any():
                stream.feed(data, time.monotonic())
    except aiohttp.ClientConnectorError as error:
        answer.reason = f"{UNREACHABLE}: {error.strerror or error}"
    except aiohttp.ConnectionTimeoutError:
        answer.reason = f"{UNREACHABLE}: no connection in time"
    except TimeoutError:
        answer.reason = "timed out"
    except (aiohttp.ClientError, OSError) as error:
        answer.reason = f"connection lost: {type(error).__name__}"
    _judge(stream, answer, asked, due, exact_length)


def _refused(answer: ClientResult, status: int, body: bytes) -> None:
    try:
        found = orjson.loads(body)
    except orjson.JSONDecodeError:
        found = None
    if status == 429:
        error = found.get("error") if isinstance(found, dict) else None
        answer.outcome = "rejected"
        answer.reason = str((error.get("code") if isinstance(error, dict) else None) or "HTTP 429")
    else:
        said = _message(found) if isinstance(found, dict) else body[:200].decode(errors="replace")
        answer.reason = f"HTTP {status}: {said}"


def _message(body: dict[str, Any]) -> str:
    error = body.get("error", body)
    said = error.get("message", error) if isinstance(error, dict) else error
    return str(said)[:200]


def _judge(stream: _Stream, answer: ClientResult, asked: WorkloadRequest, due: float, exact_length: bool) -> None:
    if stream.first is not None:
        usage = stream.counter.usage or {}
        stated = usage.get("completion_tokens")
        answer.from_usage = isinstance(stated, int)
        # Without a usage, a server that was told to write exactly so many tokens is taken to have done so when it
        # finished: an event may hold several.
        guessed = asked.output_tokens if exact_length and stream.done else stream.counter.total
        answer.tokens = stated if isinstance(stated, int) else guessed
        answer.ttft_s = stream.first - due
        answer.tpot_s = tpot(stream.first, stream.last, answer.tokens)
    if answer.reason:
        return
    if stream.error is not None:
        answer.reason = stream.error
    elif not stream.done:
        answer.reason = "the stream ended without [DONE]"
    elif stream.first is None:
        answer.reason = "an answer without tokens"
    else:
        answer.outcome = "finished"
        answer.e2e_s = stream.last - due
