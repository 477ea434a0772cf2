"""Random variation of step times around the profile, as on a real engine."""

from __future__ import annotations

import math
import random
from dataclasses import dataclass, field

DRIFT_STEPS = 40
"""Time constant of the drift, in steps: its autocorrelation falls to 1/e after this many steps."""


@dataclass(frozen=True, slots=True)
class StepJitter:
    """Standard deviations, as fractions of a step's time.

    Attributes:
        jitter: independent variation of each step.
        drift: variation that persists over about `DRIFT_STEPS` steps.
    """

    jitter: float
    drift: float

    def step_factors(self, seed: int) -> StepFactors:
        """Return the random factors of one engine."""
        return StepFactors(self, random.Random(seed))


USUAL_JITTER = StepJitter(0.1, 0.0)
"""Variation of the steps of a real engine, where a simulation is to be no easier than one. Convention."""


@dataclass(slots=True)
class StepFactors:
    """Factors on the times of successive steps: log-normal with mean 1."""

    step_jitter: StepJitter
    _random: random.Random = field(repr=False)
    _drift: float = 0.0

    def next(self) -> float:
        """Return the factor of the next step."""
        jitter, drift = self.step_jitter.jitter, self.step_jitter.drift
        decay = 1 - 1 / DRIFT_STEPS
        self._drift = decay * self._drift + drift * math.sqrt(1 - decay**2) * self._random.gauss()
        return math.exp(self._drift + jitter * self._random.gauss() - (jitter**2 + drift**2) / 2)
