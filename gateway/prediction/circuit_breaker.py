"""Stops calls to a predictor service that fails."""

from __future__ import annotations

import time
from collections.abc import Callable


class CircuitBreaker:
    """Blocks calls to a failing service. ``threshold`` consecutive failures open it for ``pause_s`` seconds.

    After the pause it allows one trial call, whose result closes it or opens it again.
    """

    def __init__(self, threshold: int = 3, pause_s: float = 1.0, clock: Callable[[], float] = time.monotonic) -> None:
        self._threshold, self._pause, self._clock = threshold, pause_s, clock
        self._failures = 0
        self._open_until = 0.0

    @property
    def closed(self) -> bool:
        """Whether fewer than ``threshold`` calls have failed since the last success."""
        return self._failures < self._threshold

    def allows(self) -> bool:
        """Whether the caller may call now. NOTE: if the breaker is open, True hands out its one trial call."""
        if self.closed:
            return True
        now = self._clock()
        if now < self._open_until:
            return False
        self._open_until = now + self._pause
        return True

    def record(self, success: bool) -> None:
        """Record the result of a call."""
        if success:
            self._failures = 0
            return
        self._failures += 1
        if self._failures >= self._threshold:
            self._open_until = self._clock() + self._pause
