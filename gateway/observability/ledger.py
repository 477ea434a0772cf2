"""The request ledger. INVARIANT: each accepted request is opened once and closed once, with one outcome."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

from gateway.observability.trace_context import TraceContext
from gateway.policies.base import Rejection
from gateway.prediction.lengths import Prediction
from gateway.requests.request import Request
from gateway.requests.slo import Bound
from gateway.scheduling.queue_outcome import Draining, EngineDown, QueueFull

Outcome = Literal["finished", "rejected", "failed", "cancelled"]
OUTCOMES: tuple[Outcome, ...] = ("finished", "rejected", "failed", "cancelled")
PromptSource = Literal["", "rendered", "given", "estimated"]
"""How a prompt was measured: the engine rendered it, the client sent tokens, or its size is an estimate."""


class LedgerError(RuntimeError):
    """A request was closed twice. This is always a bug of the gateway."""


MAX_ATTEMPTS = 16
"""Attempts of one request that are kept: the first ones, and the last one in place of any between. Bounds memory."""


@dataclass(slots=True)
class Attempt:
    """One engine that a request was placed on. Times are monotonic seconds.

    ``waiting`` requests waited there, ``position`` of them ahead in the policy's order, and ``running`` ran.
    ``predicted_tpot_s``: seconds per token of the engine's next step, by the step-time model at admission.
    ``end``: why the attempt ended without a response, such as a failure's reason or ``moved``; "" if it did not.
    """

    engine: str
    placed_s: float
    waiting: int = 0
    position: int = 0
    running: int = 0
    admitted_s: float | None = None
    predicted_ttft_s: float | None = None
    predicted_tpot_s: float | None = None
    ended_s: float | None = None
    end: str = ""

    def stop(self, end: str, now: float) -> None:
        """Note that the attempt ended at ``now`` without a response."""
        self.end, self.ended_s = end, now


@dataclass(slots=True)
class Entry:
    """One accepted request. ``prediction``: its predicted output length, None until predicted.

    ``client_id``: the ``x-request-id`` that the client sees. ``route``: the route's label in metrics. ``received_s``:
    when the body was complete. ``prompt_source``: how the prompt was measured (`PromptSource`). ``predicting_s``: when
    the prediction began and ended. ``answer``: what the engine queue answered instead of admitting the request.

    ``estimated_prompt_tokens``: the prompt size that was scheduled with, None if the engine counted it before.
    ``predicted_cached_tokens``: of these, predicted to be in the prefix cache. ``cached_tokens``: what the engine found
    there, None if it does not report that.

    Set when the entry closes: ``outcome``, ``reason`` (one of a bounded set), the measured ``ttft_s`` (None if no token
    was observed), ``tpot_s``, ``e2e_s``, the ``violated`` bounds and ``closed_s``. Durations are in seconds.
    ``received_s``, ``predicting_s`` and ``closed_s`` are times (monotonic s).
    """

    request: Request
    engine: str = ""
    prediction: Prediction | None = None
    outcome: Outcome | None = None
    reason: str = ""
    ttft_s: float | None = None
    tpot_s: float = 0.0
    e2e_s: float = 0.0
    queue_s: float = 0.0
    predicted_ttft_s: float | None = None
    estimated_prompt_tokens: int | None = None
    predicted_cached_tokens: int = 0
    cached_tokens: int | None = None
    violated: tuple[Bound, ...] = ()
    client_id: str = ""
    route: str = ""
    stream: bool = False
    received_s: float | None = None
    prompt_source: PromptSource = ""
    predicting_s: tuple[float, float] | None = None
    attempts: list[Attempt] = field(default_factory=list)
    answer: Rejection | QueueFull | EngineDown | Draining | None = None
    trace: TraceContext | None = None
    closed_s: float | None = None

    def is_open(self) -> bool:
        """Whether the request has no outcome yet."""
        return self.outcome is None

    def begin_attempt(self, attempt: Attempt) -> Attempt:
        """Note that the request was placed on another engine, or on the same one again."""
        self.engine = attempt.engine
        if len(self.attempts) < MAX_ATTEMPTS:
            self.attempts.append(attempt)
        else:
            self.attempts[-1] = attempt
        return attempt

    @property
    def predicted_tpot_s(self) -> float | None:
        """The TPOT (s) that the step-time model predicted when the request was last admitted; None before that."""
        return self.attempts[-1].predicted_tpot_s if self.attempts else None

    @property
    def attained(self) -> bool:
        """Whether the request finished and met every bound."""
        return self.outcome == "finished" and not self.violated


@dataclass(slots=True)
class Ledger:
    """Counts accepted requests and their outcomes.

    ``on_open`` is called with each accepted request, ``on_close`` with each entry as it closes.
    """

    on_close: Callable[[Entry], None] = lambda entry: None
    on_open: Callable[[Request], None] = lambda request: None
    accepted: int = 0
    closed: Counter[str] = field(default_factory=Counter)
    attained: int = 0

    def open(self, request: Request) -> Entry:
        """Record an accepted request and return its entry."""
        self.accepted += 1
        self.on_open(request)
        return Entry(request)

    def close(self, entry: Entry, outcome: Outcome, reason: str = "") -> None:
        """Close ``entry`` with its outcome. Raises `LedgerError` if it is already closed."""
        if entry.outcome is not None:
            raise LedgerError(
                f"request {entry.request.id} closed as {outcome} but was already closed as {entry.outcome}"
            )
        entry.outcome, entry.reason, entry.closed_s = outcome, reason, time.monotonic()
        if outcome == "finished":
            entry.violated = entry.request.slo.violated(entry.ttft_s, entry.tpot_s, entry.e2e_s)
        self.closed[outcome] += 1
        self.attained += entry.attained
        self.on_close(entry)

    @property
    def open_count(self) -> int:
        """Number of accepted requests that have not ended. INVARIANT: 0 when the gateway is idle."""
        return self.accepted - self.closed.total()
