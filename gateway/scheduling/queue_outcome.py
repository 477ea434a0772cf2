"""How a request leaves the queue of one engine."""

from __future__ import annotations

import asyncio
from collections import deque
from dataclasses import dataclass

from gateway.policies.base import Rejection

ANSWERS_AT_ONCE = 32
"""Requests of one queue that leave it in one iteration of the event loop, except by admission.

To answer one, or to place it again, takes about 0.5 ms. Thousands may leave at once; others must not wait for them."""


@dataclass(slots=True, frozen=True)
class EngineDown:
    """The engine is down and will not be back in time for this request."""

    retry_after_s: float


@dataclass(slots=True, frozen=True)
class Draining:
    """The gateway shuts down: the request can be sent again to another gateway, or to this one after a restart."""


@dataclass(slots=True, frozen=True)
class QueueFull:
    """The queue of ``slo_class`` is at its ``limit``, ``max_waiting`` of the class."""

    slo_class: str
    limit: int
    retry_after_s: float


@dataclass(slots=True, frozen=True)
class Admitted:
    """The engine serves the request; its first token is predicted ``predicted_ttft_s`` after arrival."""

    predicted_ttft_s: float | None


@dataclass(slots=True, frozen=True)
class Reroute:
    """Another engine can serve the request: this one is down or rests, or the other one has just begun to serve."""


QueueOutcome = Reroute | Admitted | Rejection | EngineDown | Draining | QueueFull


class Answers:
    """Sets the outcomes of requests, at most `ANSWERS_AT_ONCE` in each iteration of the event loop, in order."""

    def __init__(self) -> None:
        self._later: deque[tuple[asyncio.Future[QueueOutcome], QueueOutcome]] = deque()
        self._given = 0
        """Outcomes set in this iteration of the event loop; 0 if none was set in the last one either."""

    def give(self, future: asyncio.Future[QueueOutcome], outcome: QueueOutcome) -> None:
        """Set ``outcome`` now, or in a later iteration."""
        if self._given >= ANSWERS_AT_ONCE:
            self._later.append((future, outcome))
            return
        if not self._given:
            asyncio.get_running_loop().call_soon(self._continue)
        self._given += 1
        future.set_result(outcome)

    def _continue(self) -> None:
        self._given = 0
        while self._later and self._given < ANSWERS_AT_ONCE:
            future, outcome = self._later.popleft()
            if not future.done():
                self._given += 1
                future.set_result(outcome)
        if self._given:
            asyncio.get_running_loop().call_soon(self._continue)
