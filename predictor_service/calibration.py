"""From a score that only ranks prompts to tokens: conditional quantiles of the length, with cut-off answers
counted.

Split conformal in groups: held-out answers are sorted by score and cut in equal groups; a group's quantile is
the Kaplan-Meier one, where an answer that hit the output limit says "at least this long",

    S(t) = prod over lengths u <= t of (1 - d_u / n_u),     q-quantile = smallest t with S(t) <= 1 - q,

with d_u answers ending at u out of n_u at least that long. Between the groups' mean scores it is
interpolated.
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
    """Knots of the two curves; each shape (groups,), scores strictly and quantiles weakly increasing;
    tokens."""

    score: Floats
    p50: Floats
    p90: Floats


def fit_calibration(score: Floats, length: Floats, censored: Flags, groups: int = 8) -> Calibration:
    """The median and the 90th percentile of ``length`` (tokens) by ``score``, all of shape (rows,).

    Raises ValueError with fewer rows than 20 a group: a 90th percentile needs that many.
    """
    groups = min(groups, len(score) // 20)
    if groups < 1:
        raise ValueError(f"calibration needs at least 20 held-out answers, got {len(score)}")
    order = np.argsort(score, kind="stable")
    knots: list[float] = []
    medians: list[float] = []
    tails: list[float] = []
    for rows in np.array_split(order, groups):
        knot = float(score[rows].mean())
        if knots and knot <= knots[-1] + 1e-9:
            continue
        # The finite-sample correction of split conformal prediction: the next answer is one more of the group.
        level = min(0.9 * (len(rows) + 1) / len(rows), 1.0 - 1.0 / len(rows))
        knots.append(knot)
        medians.append(censored_quantile(length[rows], censored[rows], 0.5))
        tails.append(censored_quantile(length[rows], censored[rows], level))
    p50 = np.maximum.accumulate(np.array(medians))
    return Calibration(np.array(knots), p50, np.maximum(np.maximum.accumulate(np.array(tails)), p50))


def censored_quantile(length: Floats, censored: Flags, level: float) -> float:
    """The ``level`` quantile of ``length`` (shape (rows,), tokens), reading a censored one as "at least".

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
    rate = math.log(0.5 / left) / max(longest - median, 1.0) if left < 0.5 else 0.0
    return longest + math.log(left / (1.0 - level)) / rate if rate > 0 else longest
