"""Lengths as classes: the two ways of cutting them into bins, and how good a guess of the bin is.

SCORPIO, section 3.2 and appendix A.4: *equal-width* bins divide the range of lengths evenly, *equal-frequency* bins
hold as many answers each. A bin stands for its middle when it is read as tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Places = NDArray[np.int64]

Strategy = Literal["equal-width", "equal-frequency"]
STRATEGIES: tuple[Strategy, ...] = get_args(Strategy)

PAPER_BINS = (10, 20, 50, 100, 200, 500, 1000)
"""The counts of the paper's table 5."""

DEFAULT_BINS = 100
"""What the paper settles on, with equal width."""


@dataclass(slots=True, frozen=True)
class Buckets:
    """Bin i holds the lengths in [``edges``[i], ``edges``[i + 1]), in tokens; shorter and longer ones fall into the
    first and the last.

    ``edges``: shape (bins + 1,), strictly increasing.
    """

    edges: Floats

    @property
    def count(self) -> int:
        """How many bins."""
        return len(self.edges) - 1

    @property
    def middles(self) -> Floats:
        """What each bin reads as, tokens; shape (bins,)."""
        return np.asarray((self.edges[1:] + self.edges[:-1]) / 2.0, dtype=np.float64)

    def place(self, length: Floats) -> Places:
        """The bin of each length; same shape, 0 to ``count`` - 1."""
        return np.searchsorted(self.edges[1:-1], length, side="right").astype(np.int64)

    def quantiles(self, shares: Floats, level: float) -> Floats:
        """The ``level`` quantile of each row's distribution, tokens; shape (rows,).

        ``shares``: shape (rows, bins), each row's sum is 1. Within a bin the probability is spread evenly.
        """
        reached = np.cumsum(shares, axis=1)
        bins = np.minimum((reached < level).sum(axis=1), self.count - 1)
        rows = np.arange(len(shares))
        inside = shares[rows, bins]
        missing = level - (reached[rows, bins] - inside)
        part = np.clip(np.divide(missing, inside, out=np.full_like(missing, 0.5), where=inside > 0), 0.0, 1.0)
        return np.asarray(self.edges[bins] + part * (self.edges[bins + 1] - self.edges[bins]), dtype=np.float64)


def fit_buckets(length: Floats, count: int, strategy: Strategy) -> Buckets:
    """Bins for answers of these lengths (tokens, shape (rows,)), from 0 to just past the longest.

    Equal-frequency bins are fewer than ``count`` where many answers are of one and the same length. Raises ValueError
    when there is nothing to cut.
    """
    if count < 2 or not len(length) or length.max() < 1:
        raise ValueError("buckets need at least 2 bins and an answer of at least one token")
    top = float(length.max()) + 1.0
    if strategy == "equal-width":
        return Buckets(np.linspace(0.0, top, count + 1))
    # On whole tokens, so that equal lengths share a bin.
    inner = np.unique(np.ceil(np.quantile(length, np.linspace(0.0, 1.0, count + 1)[1:-1])))
    return Buckets(np.concatenate([[0.0], inner[(inner > 0) & (inner < top)], [top]]))


def off_by(guessed: Places, actual: Places, most: int) -> float:
    """The share of guesses at most ``most`` bins away; 0 is the accuracy."""
    return float((np.abs(guessed - actual) <= most).mean())
