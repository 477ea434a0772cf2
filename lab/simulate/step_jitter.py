"""Engines whose steps do not take what the profile says, but that on the average: what planning has to live with."""

from __future__ import annotations

import math
import random
from dataclasses import dataclass, field

DRIFTS_OVER = 40
"""Steps after which a drift is forgotten (to 1/e)."""


@dataclass(frozen=True, slots=True)
class StepJitter:
    """Standard deviations, as shares of a step's time: ``jitter`` from step to step, ``drift`` over `DRIFTS_OVER`."""

    jitter: float
    drift: float

    def speeds(self, seed: int) -> Speeds:
        """Those of an engine."""
        return Speeds(self, random.Random(seed))


@dataclass(slots=True)
class Speeds:
    """What one step's time after another is multiplied by: log-normal, with a mean of 1."""

    step_jitter: StepJitter
    _random: random.Random = field(repr=False)
    _drift: float = 0.0

    def next(self) -> float:
        """The next step's."""
        jitter, drift = self.step_jitter.jitter, self.step_jitter.drift
        keeps = 1 - 1 / DRIFTS_OVER
        self._drift = keeps * self._drift + drift * math.sqrt(1 - keeps**2) * self._random.gauss()
        return math.exp(self._drift + jitter * self._random.gauss() - (jitter**2 + drift**2) / 2)
