"""How many prompt tokens come in a second, of late: what a place in the batch can bring with it at most."""

from __future__ import annotations

import math
from dataclasses import dataclass

MEMORY_S = 10.0
"""A prompt that came so long ago counts for 1/e of one that comes now."""


@dataclass(slots=True)
class PromptRate:
    """An exponentially weighted mean, corrected for the short time that it has seen at first."""

    _tokens: float = 0.0
    _since_s: float = math.inf
    _until_s: float = -math.inf
    _newest_s: float = -math.inf

    @property
    def newest_s(self) -> float:
        """When the newest request that was counted came (monotonic s)."""
        return self._newest_s

    def note(self, now: float, tokens: float, newest_s: float) -> None:
        """So many prompt tokens have come since the last time, the newest of them at ``newest_s``."""
        self._since_s = min(self._since_s, now)
        self._tokens = self._tokens * self._decay(now) + tokens
        self._until_s, self._newest_s = max(now, self._until_s), max(newest_s, self._newest_s)

    def per_s(self, now: float) -> float:
        """Tokens per second; infinite before there is anything to go by."""
        seen = -math.expm1(-(now - self._since_s) / MEMORY_S) if now > self._since_s else 0.0
        return self._tokens * self._decay(now) / (MEMORY_S * seen) if seen else math.inf

    def _decay(self, now: float) -> float:
        return math.exp((self._until_s - now) / MEMORY_S) if now > self._until_s > -math.inf else 1.0
