"""The request ledger. INVARIANT: each accepted request is opened once and closed once, with one outcome."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

from gateway.prediction.client import Prediction
from gateway.requests.request import Request
from gateway.requests.slo import Bound

Outcome = Literal["finished", "rejected", "failed", "cancelled"]
OUTCOMES: tuple[Outcome, ...] = ("finished", "rejected", "failed", "cancelled")


class LedgerError(RuntimeError):
    """A request was closed twice. This is always a bug of the gateway."""


@dataclass(slots=True)
class Entry:
    """One accepted request. ``prediction``: its predicted output length, None until predicted.

    ``estimated_prompt_tokens``: the prompt size that was scheduled with, None if the engine counted it before.
    ``predicted_cached_tokens``: of these, predicted to be in the prefix cache. ``cached_tokens``: what the engine found
    there, None if it does not report that.

    Set when the entry closes: ``outcome``, ``reason`` (one of a bounded set), the measured ``ttft_s`` (None if no token
    was observed), ``tpot_s``, ``e2e_s`` and the ``violated`` bounds. Times are in seconds.
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
        entry.outcome, entry.reason = outcome, reason
        if outcome == "finished":
            entry.violated = entry.request.slo.violated(entry.ttft_s, entry.tpot_s, entry.e2e_s)
        self.closed[outcome] += 1
        self.attained += entry.attained
        self.on_close(entry)

    @property
    def open_count(self) -> int:
        """Number of accepted requests that have not ended. INVARIANT: 0 when the gateway is idle."""
        return self.accepted - self.closed.total()
