"""Report output lengths of finished requests to the predictor service, which corrects its predictions with them.

Reports wait in a bounded queue, and a background task sends them in batches. No request waits for it. While the service
is unreachable the queue keeps the newest `MAX_QUEUED` reports, so that a restarted service receives them.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

BATCH_DELAY_S, RETRY_S = 0.25, 2.0
"""Delay before a batch is sent, to collect more reports, and before the next try to reach the service. In seconds."""

MAX_QUEUED, MAX_BATCH = 4096, 512
"""Reports in the queue and in one call."""


@dataclass(frozen=True, slots=True)
class LengthReport:
    """The predicted and actual output length of one finished request, in tokens.

    ``id`` is the request id in the call that predicted it. ``raw_p50`` and ``raw_p90`` are the service's quantiles
    before its correction. ``censored``: a token limit ended the output.
    """

    id: str
    model: str | None
    slo_class: str | None
    raw_p50: float
    raw_p90: float
    tokens: int
    censored: bool


class UnreachableError(Exception):
    """The service is unreachable; the reports may be sent again later."""


class LengthReports:
    """Sends reports with ``post``, and again later if that raises `UnreachableError`. Use on one event loop."""

    def __init__(self, post: Callable[[list[LengthReport]], Awaitable[None]]) -> None:
        self.sent = self.dropped = 0
        self._post = post
        self._queued: deque[LengthReport] = deque()
        self._sender: asyncio.Task[None] | None = None

    def add(self, report: LengthReport) -> None:
        """Queue ``report``. A full queue drops its oldest report."""
        if len(self._queued) >= MAX_QUEUED:
            self._queued.popleft()
            self.dropped += 1
        self._queued.append(report)
        if self._sender is None or self._sender.done():
            self._sender = asyncio.create_task(self._send(), name="report lengths")

    async def _send(self) -> None:
        while self._queued:
            await asyncio.sleep(BATCH_DELAY_S)
            batch = [self._queued.popleft() for _ in range(min(len(self._queued), MAX_BATCH))]
            try:
                await self._post(batch)
                self.sent += len(batch)
            except UnreachableError:
                free = max(MAX_QUEUED - len(self._queued), 0)
                kept = batch[len(batch) - min(free, len(batch)) :]
                self.dropped += len(batch) - len(kept)
                self._queued.extendleft(reversed(kept))
                await asyncio.sleep(RETRY_S)

    async def close(self) -> None:
        """Stop sending and drop queued reports."""
        sender, self._sender = self._sender, None
        if sender is not None:
            sender.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await sender
