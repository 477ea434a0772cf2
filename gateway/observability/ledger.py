"""The ledger: every accepted request is opened once and closed once, in exactly one outcome."""

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
    """A request was closed twice: a bug, never a condition."""


@dataclass(slots=True)
class Entry:
    """One accepted request in the ledger. ``prediction``: of its output length, once there is one.

    After closing: ``outcome`` and ``reason`` (a short, bounded word), the measured ``ttft_s`` (None: no token was
    seen), ``tpot_s``, ``e2e_s``, and the bounds it ``violated``.
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
    violated: tuple[Bound, ...] = ()

    @property
    def attained(self) -> bool:
        """Finished with every bound met."""
        return self.outcome == "finished" and not self.violated


@dataclass(slots=True)
class Ledger:
    """Counts what was accepted and how it ended; ``on_close`` is told of each entry as it closes."""

    on_close: Callable[[Entry], None] = lambda entry: None
    accepted: int = 0
    closed: Counter[str] = field(default_factory=Counter)
    attained: int = 0

    def open(self, request: Request) -> Entry:
        """Accept a request."""
        self.accepted += 1
        return Entry(request)

    def close(self, entry: Entry, outcome: Outcome, reason: str = "") -> None:
        """Close ``entry``; raises `LedgerError` if it was closed before."""
        if entry.outcome is not None:
            raise LedgerError(f"request {entry.request.id} ended as {entry.outcome} and again as {outcome}")
        entry.outcome, entry.reason = outcome, reason
        if outcome == "finished":
            entry.violated = entry.request.slo.violated(entry.ttft_s, entry.tpot_s, entry.e2e_s)
        self.closed[outcome] += 1
        self.attained += entry.attained
        self.on_close(entry)

    @property
    def open_count(self) -> int:
        """Requests accepted and not ended yet; the ledger balances when an idle gateway shows 0."""
        return self.accepted - self.closed.total()
