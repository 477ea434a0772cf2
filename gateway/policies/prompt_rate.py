"""How many prompt tokens come in a second, of late: what the places of a batch can bring with them at most.

The larger of a short and a long average: a surge is seen within a second, and a lull is not forgotten for a moment.
Counted when they are decided on, admitted or refused: every request is, once.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

MEMORIES_S = (1.0, 10.0)
"""A prompt that was decided on so long ago counts for 1/e of one of now."""


@dataclass(slots=True)
class _Average:
    """Exponentially weighted, and corrected for the short time that it has seen at first."""

    memory_s: float
    _tokens: float = 0.0
    _since_s: float = math.inf
    _until_s: float = -math.inf

    def note(self, now: float, tokens: float) -> None:
        self._since_s = min(self._since_s, now)
        self._tokens = self._tokens * self._decay(now) + tokens
        self._until_s = max(now, self._until_s)

    def per_s(self, now: float) -> float:
        seen = -math.expm1(-(now - self._since_s) / self.memory_s) if now > self._since_s else 0.0
        return self._tokens * self._decay(now) / (self.memory_s * seen) if seen else math.inf

    def _decay(self, now: float) -> float:
        return math.exp((self._until_s - now) / self.memory_s) if now > self._until_s > -math.inf else 1.0


@dataclass(slots=True)
class PromptRate:
    """Prompt tokens a second."""

    _averages: tuple[_Average, ...] = field(default_factory=lambda: tuple(map(_Average, MEMORIES_S)))

    def note(self, now: float, tokens: float) -> None:
        """So many prompt tokens were decided on at ``now`` (monotonic s)."""
        if tokens:
            for average in self._averages:
                average.note(now, tokens)

    def per_s(self, now: float) -> float:
        """Tokens per second; infinite before there is anything to go by."""
        return max(average.per_s(now) for average in self._averages)
