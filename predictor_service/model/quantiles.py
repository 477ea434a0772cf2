"""From an estimated median to quantiles of the length, with cut-off answers counted.

The estimate m(x) is corrected by ratios r = y / m(x) of held-out answers:

    p50 = m * (the median of r),        p90 = m * q(m)

where q is r's upper quantile among answers of about the same estimate: the held-out answers are sorted by m and cut
into equal groups, and between the groups' mean estimates q is interpolated (split conformal in groups: long answers
spread less, relative to their estimate, than short ones). Quantiles are Kaplan-Meier's, where an answer that hit the
output limit says "at least this long",

    S(t) = prod over u <= t of (1 - d_u / n_u),     q-quantile = smallest t with S(t) <= 1 - q,

with d_u answers ending at u out of n_u at least that long.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Flags = NDArray[np.bool_]


@dataclass(slots=True, frozen=True)
class Calibration:
    """``middle``: shape (1,), what the estimate is multiplied by for the median; ``tail``: shape (groups,), for the
    90th percentile at estimates of ``estimate`` tokens (shape (groups,), strictly increasing)."""

    middle: Floats
    estimate: Floats
    tail: Floats

    def quantiles(self, estimate: Floats) -> tuple[Floats, Floats]:
        """p50 and p90 in tokens for each estimate (tokens), all of shape (rows,); 1 <= p50 <= p90."""
        positive = np.maximum(estimate, 1.0)
        p50 = np.maximum(positive * self.middle[0], 1.0)
        return p50, np.maximum(positive * np.interp(positive, self.estimate, self.tail), p50)


def fit_calibration(estimate: Floats, length: Floats, censored: Flags, groups: int = 8) -> Calibration:
    """The correction of ``estimate`` by ``length`` (both tokens), all of shape (rows,).

    Raises ValueError with fewer than 20 rows: a 90th percentile needs that many.
    """
    groups = min(groups, len(estimate) // 20)
    if groups < 1:
        raise ValueError(f"calibration needs at least 20 held-out answers, got {len(estimate)}")
    positive = np.maximum(estimate, 1.0)
    ratio = length / positive
    knots: list[float] = []
    tails: list[float] = []
    for rows in np.array_split(np.argsort(positive, kind="stable"), groups):
        knot = float(positive[rows].mean())
        if knots and knot <= knots[-1] + 1e-9:
            continue
        # The finite-sample correction of split conformal prediction: the next answer is one more of the group.
        level = min(0.9 * (len(rows) + 1) / len(rows), 1.0 - 1.0 / len(rows))
        knots.append(knot)
        tails.append(censored_quantile(ratio[rows], censored[rows], level))
    return Calibration(np.array([censored_quantile(ratio, censored, 0.5)]), np.array(knots), np.array(tails))


def censored_quantile(length: Floats, censored: Flags, level: float) -> float:
    """The ``level`` quantile of ``length`` (shape (rows,), any unit), reading a censored one as "at least".

    Where the survival curve ends above 1 - ``level`` because the longest answers are all cut off, an
    exponential tail through its median goes on from there.
    """
    ends, ended = np.unique(length[~censored], return_counts=True)
    at_least = len(length) - np.searchsorted(np.sort(length), ends, side="left")
    survival = np.cumprod(1.0 - ended / at_least)
    reached = np.flatnonzero(survival <= 1.0 - level + 1e-12)
    if len(reached):
        return float(ends[reached[0]])
    longest = float(length.max())
    middle = np.flatnonzero(survival <= 0.5)
    if not len(middle):
        return longest
    left, median = float(survival[-1]), float(ends[middle[0]])
    rate = math.log(0.5 / left) / ((longest - median) or longest) if left < 0.5 else 0.0
    return longest + math.log(left / (1.0 - level)) / rate if rate > 0 else longest
