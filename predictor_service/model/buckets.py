"""Bins of output lengths, cut by equal width or equal frequency (SCORPIO, section 3.2 and appendix A.4)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
BinIndices = NDArray[np.int64]

Strategy = Literal["equal-width", "equal-frequency"]
STRATEGIES: tuple[Strategy, ...] = get_args(Strategy)

PAPER_BINS = (10, 20, 50, 100, 200, 500, 1000)
"""Numbers of bins in table 5 of the paper."""

DEFAULT_BINS = 100
"""Number of bins that the paper uses, with equal width."""


@dataclass(slots=True, frozen=True)
class Buckets:
    """Bins of lengths. Bin i holds the lengths in [``edges``[i], ``edges``[i + 1]) tokens.

    Lengths outside the range fall into the first or the last bin.

    ``edges``: shape (bins + 1,), strictly increasing.
    """

    edges: Floats

    @property
    def count(self) -> int:
        """Number of bins."""
        return len(self.edges) - 1

    @property
    def midpoints(self) -> Floats:
        """The length that each bin stands for, in tokens; shape (bins,)."""
        return np.asarray((self.edges[1:] + self.edges[:-1]) / 2.0, dtype=np.float64)

    def index_of(self, length: Floats) -> BinIndices:
        """Return the bin of each length, 0 to ``count`` - 1; same shape as ``length``."""
        return np.searchsorted(self.edges[1:-1], length, side="right").astype(np.int64)

    def quantiles(self, probabilities: Floats, level: float) -> Floats:
        """Return the ``level`` quantile of each row's distribution, in tokens; shape (rows,).

        ``probabilities``: shape (rows, bins); each row sums to 1. Within a bin, probability is spread evenly.
        """
        cumulative = np.cumsum(probabilities, axis=1)
        bins = np.minimum((cumulative < level).sum(axis=1), self.count - 1)
        rows = np.arange(len(probabilities))
        inside = probabilities[rows, bins]
        missing = level - (cumulative[rows, bins] - inside)
        part = np.clip(np.divide(missing, inside, out=np.full_like(missing, 0.5), where=inside > 0), 0.0, 1.0)
        return np.asarray(self.edges[bins] + part * (self.edges[bins + 1] - self.edges[bins]), dtype=np.float64)


def fit_buckets(length: Floats, count: int, strategy: Strategy) -> Buckets:
    """Return bins from 0 to just past the longest of these lengths (tokens, shape (rows,)).

    Equal lengths share a bin, so there may be fewer equal-frequency bins than ``count``.

    Raises:
        ValueError: ``count`` is below 2, or no answer has a token.
    """
    if count < 2 or not len(length) or length.max() < 1:
        raise ValueError("buckets need at least 2 bins and an answer of at least one token")
    top = float(length.max()) + 1.0
    if strategy == "equal-width":
        return Buckets(np.linspace(0.0, top, count + 1))
    # Edges are whole tokens, so that equal lengths share a bin.
    inner = np.unique(np.ceil(np.quantile(length, np.linspace(0.0, 1.0, count + 1)[1:-1])))
    return Buckets(np.concatenate([[0.0], inner[(inner > 0) & (inner < top)], [top]]))


def off_by(predicted: BinIndices, actual: BinIndices, max_bins: int) -> float:
    """Return the share of predictions that are at most ``max_bins`` bins off; with 0 it is the accuracy."""
    return float((np.abs(predicted - actual) <= max_bins).mean())
