"""Finished requests' lengths on their way to the predictor service, which learns each model's scale from them.

Fire and forget: what is reported waits in a bounded queue and goes out in batches, by a task that exists only while
there is something to send. No request ever waits for it. While the service is away the newest `MOST_WAITING` reports
are kept, so that a restarted one learns what it missed.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

GATHER_S, RETRY_S = 0.25, 2.0
"""How long reports gather before they are sent, and how long an unreachable service is left alone."""

MOST_WAITING, MOST_AT_ONCE = 4096, 512


@dataclass(frozen=True, slots=True)
class LengthReport:
    """A finished request: the served ``model``, its class, what the service's length model had said before corrections
    (tokens), and what came of it; ``censored`` when its limit stopped it. ``id``: what the service was asked under."""

    id: str
    model: str
    slo_class: str
    raw_p50: float
    raw_p90: float
    tokens: int
    censored: bool


class UnreachableError(Exception):
    """The service did not take the reports now; it may later."""


class LengthReports:
    """Sends reports by ``post``, which raises `UnreachableError` to be tried again. Use on one event loop."""

    def __init__(self, post: Callable[[list[LengthReport]], Awaitable[None]]) -> None:
        self.sent = self.dropped = 0
        self._post = post
        self._waiting: deque[LengthReport] = deque()
        self._sender: asyncio.Task[None] | None = None

    def add(self, report: LengthReport) -> None:
        """Report, some time soon; the oldest that waits makes room when there are too many."""
        if len(self._waiting) >= MOST_WAITING:
            self._waiting.popleft()
            self.dropped += 1
        self._waiting.append(report)
        if self._sender is None or self._sender.done():
            self._sender = asyncio.create_task(self._send(), name="report lengths")

    async def _send(self) -> None:
        while self._waiting:
            await asyncio.sleep(GATHER_S)
            batch = [self._waiting.popleft() for _ in range(min(len(self._waiting), MOST_AT_ONCE))]
            try:
                await self._post(batch)
                self.sent += len(batch)
            except UnreachableError:
                room = max(MOST_WAITING - len(self._waiting), 0)
                kept = batch[len(batch) - min(room, len(batch)) :]
                self.dropped += len(batch) - len(kept)
                self._waiting.extendleft(reversed(kept))
                await asyncio.sleep(RETRY_S)

    async def close(self) -> None:
        """Stop sending; what waits is dropped."""
        sender, self._sender = self._sender, None
        if sender is not None:
            sender.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await sender
