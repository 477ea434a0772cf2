"""Turns an estimated median into p50 and p90 of the output length, with truncated answers treated as censored.

The estimate m(x) is corrected by the ratios r = y / m(x) of held-out answers:

    p50 = m * (the median of r),        p90 = m * q(m)

q(m) is an upper quantile of r (split conformal prediction in groups). Held-out answers are sorted by m and cut into
groups of equal size. Each group has its own quantile, and q is interpolated between the mean estimates of the groups:
long answers spread less, relative to their estimate, than short ones. Quantiles are Kaplan-Meier's, where an answer
that reached the output limit is a lower bound:

    S(t) = prod over u <= t of (1 - d_u / n_u),     q-quantile = smallest t with S(t) <= 1 - q.

Of the n_u answers that are at least u tokens long, d_u end at u.
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
    """Factors from the estimate to the quantiles.

    ``middle``: factor for the median, shape (1,).
    ``estimate``: mean estimate of each group, in tokens, shape (groups,), strictly increasing.
    ``tail``: factor for the 90th percentile at those estimates, shape (groups,).
    """

    middle: Floats
    estimate: Floats
    tail: Floats

    def quantiles(self, estimate: Floats) -> tuple[Floats, Floats]:
        """Return p50 and p90 in tokens for each estimate (tokens), all of shape (rows,); 1 <= p50 <= p90."""
        positive = np.maximum(estimate, 1.0)
        p50 = np.maximum(positive * self.middle[0], 1.0)
        return p50, np.maximum(positive * np.interp(positive, self.estimate, self.tail), p50)


def fit_calibration(estimate: Floats, length: Floats, censored: Flags, groups: int = 8) -> Calibration:
    """Return the correction of ``estimate`` by ``length`` (both in tokens), all of shape (rows,).

    Raises:
        ValueError: there are fewer than 20 rows, too few for a 90th percentile.
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
        # Finite-sample correction of split conformal prediction: the next answer is one more of the group.
        level = min(0.9 * (len(rows) + 1) / len(rows), 1.0 - 1.0 / len(rows))
        knots.append(knot)
        tails.append(censored_quantile(ratio[rows], censored[rows], level))
    return Calibration(np.array([censored_quantile(ratio, censored, 0.5)]), np.array(knots), np.array(tails))


def censored_quantile(length: Floats, censored: Flags, level: float) -> float:
    """Return the ``level`` quantile of ``length`` (shape (rows,), any unit); censored lengths are lower bounds.

    If the longest answers are all censored, the survival curve may end above 1 - ``level``. An exponential tail
    through the median then extends it.
    """
    ends, deaths = np.unique(length[~censored], return_counts=True)
    at_risk = len(length) - np.searchsorted(np.sort(length), ends, side="left")
    survival = np.cumprod(1.0 - deaths / at_risk)
    reached = np.flatnonzero(survival <= 1.0 - level + 1e-12)
    if len(reached):
        return float(ends[reached[0]])
    longest = float(length.max())
    middle = np.flatnonzero(survival <= 0.5)
    if not len(middle):
        return longest
    last, median = float(survival[-1]), float(ends[middle[0]])
    rate = math.log(0.5 / last) / ((longest - median) or longest) if last < 0.5 else 0.0
    return longest + math.log(last / (1.0 - level)) / rate if rate > 0 else longest
