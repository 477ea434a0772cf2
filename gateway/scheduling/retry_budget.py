"""Limits how many requests are sent to a second engine, so that failing engines cannot multiply the load."""

from __future__ import annotations

import math
from dataclasses import dataclass

WINDOW_S = 10.0
"""Seconds for which unused retries are kept, and over which requests count as recent. As in Finagle and Linkerd."""


@dataclass(slots=True, eq=False)
class RetryBudget:
    """A token bucket for retries. Times are monotonic seconds.

    Retries are at most ``ratio`` of the recent requests, plus ``per_second``. Both are kept for about `WINDOW_S`.
    """

    ratio: float = 0.2
    per_second: float = 10.0
    _earned: float = 0.0
    _reserve: float = 0.0
    _at: float | None = None

    def on_request(self, now: float) -> None:
        """Count a request."""
        self._advance(now)
        self._earned += self.ratio

    def available(self, now: float) -> bool:
        """Whether a retry is within the budget."""
        self._advance(now)
        return self._earned + self._reserve >= 1 - 1e-9

    def spend(self, now: float) -> bool:
        """Take one retry from the budget. Return False if it is exhausted."""
        if not self.available(now):
            return False
        earned = min(self._earned, 1.0)
        self._earned -= earned
        self._reserve -= 1 - earned
        return True

    def _advance(self, now: float) -> None:
        if self._at is None:
            self._at, self._reserve = now, self.per_second * WINDOW_S
        elapsed, self._at = max(0.0, now - self._at), max(now, self._at)
        self._earned *= math.exp(-elapsed / WINDOW_S)
        self._reserve = min(self._reserve + self.per_second * elapsed, self.per_second * WINDOW_S)
