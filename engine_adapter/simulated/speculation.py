"""Speculative decoding of a simulated engine: how many drafts a decode has, and how many of them are accepted."""

from __future__ import annotations

import math
import random
from dataclasses import dataclass, field
from typing import Protocol

from engine_adapter.simulated.sequence import SimulatedSequence


class Speculation(Protocol):
    """Speculative decoding as the simulated scheduler needs it."""

    @property
    def draft_tokens(self) -> int:
        """Drafts per decode, vLLM's ``num_speculative_tokens``; 0 for none."""

    @property
    def draft_s(self) -> float:
        """Seconds that drafting adds to a step with drafts."""

    def accepted(self, sequence: SimulatedSequence, drafts: int) -> int:
        """Return how many of ``drafts`` drafts of ``sequence`` are accepted."""


@dataclass(slots=True)
class RandomAcceptance:
    """Accepts each draft with probability ``rate``, up to the first that is rejected. Implements `Speculation`."""

    draft_tokens: int = 0
    rate: float = 0.0
    draft_s: float = 0.0
    seed: int = 0
    _random: random.Random = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if self.draft_tokens < 0 or not 0 <= self.rate <= 1 or self.draft_s < 0:
            raise ValueError("speculation needs draft_tokens and draft_s of at least 0, and a rate from 0 to 1")
        self._random = random.Random(self.seed)

    def accepted(self, sequence: SimulatedSequence, drafts: int) -> int:
        """Return a number of accepted drafts at random."""
        if self.rate >= 1:
            return drafts
        # P(at least n accepted) = rate^n.
        return 0 if self.rate <= 0 else min(drafts, int(math.log(1 - self._random.random()) / math.log(self.rate)))
