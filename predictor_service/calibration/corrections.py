"""Corrects predicted quantiles to the observed scale, with one correction fitted to finished answers.

With x = ln p50 and s = ln(p90 / p50) as predicted, and y the log of the output length, the corrected quantiles are

    ln p50' = a + b x,          ln p90' = ln p50' + q s.

*Slope b*: the value of a grid with the least absolute error in tokens. A model may rank another model's answers well
and still spread them too widely or too little. b = 0 is the constant median, for predictions that carry no information.

*Shift a*: for each b, the median of y - b x.

*Stretch q*: the 0.9 (n + 1) / n quantile of (y - ln p50') / s. This is split conformal prediction on normalised
residuals: p90' covers the next answer with probability 0.9 for any distribution of lengths (Lei et al. 2018, section
5.2; Romano et al. 2019).

An answer that ``max_tokens`` truncated is a lower bound: quantiles are Kaplan-Meier's, and the error behind b counts
only the amount by which the prediction is too short.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from predictor_service.model.length_model import MAX_TOKENS, Prediction

Floats = NDArray[np.float64]
Flags = NDArray[np.bool_]

SLOPES = (1.0, 0.75, 1.25, 0.5, 0.25, 0.0)
"""Candidates for b. On a tie the first one wins; 1 keeps the length model's own slope."""

MIN_SPREAD = 0.1
"""Lower bound of s, which divides the residuals: without a spread, q would be arbitrary."""

_MAX_STRETCH = 20.0
_MAX_LOG_TOKENS = math.log(MAX_TOKENS)


@dataclass(slots=True, frozen=True)
class Answers:
    """Finished answers and their predictions; every array has shape (rows,).

    ``x`` = ln p50 and ``s`` = ln(p90 / p50) as predicted (tokens). ``y`` = ln of the output length (tokens).
    ``complete``: False if the answer was truncated, so that ``y`` is a lower bound. ``weight``: the number of answers
    that the row counts as.
    """

    x: Floats
    s: Floats
    y: Floats
    complete: Flags
    weight: Floats


@dataclass(slots=True, frozen=True)
class Correction:
    """``slope`` b, ``shift`` a and ``stretch`` q of the equation of the module."""

    slope: float
    shift: float
    stretch: float

    def apply(self, predicted: Prediction) -> Prediction:
        """Return the corrected quantiles, before any clamp; the point estimate is the median."""
        x, s = log_scale(predicted.p50, predicted.p90)
        middle = min(max(self.shift + self.slope * x, 0.0), _MAX_LOG_TOKENS)
        p50 = math.exp(middle)
        return Prediction(length=p50, p50=p50, p90=math.exp(min(middle + self.stretch * s, _MAX_LOG_TOKENS)))


def log_scale(p50: float, p90: float) -> tuple[float, float]:
    """Return x and s of predicted quantiles (tokens)."""
    x = math.log(max(p50, 1.0))
    return x, max(math.log(max(p90, 1.0)) - x, MIN_SPREAD)


def fit_correction(answers: Answers) -> Correction:
    """Return the correction that fits ``answers`` (at least one row) best; see the module."""
    lengths = np.exp(answers.y)
    limit = _MAX_LOG_TOKENS if answers.complete.all() else float(answers.y[~answers.complete].max())
    best = math.inf
    slope = shift = 0.0
    for candidate in SLOPES:
        offsets = answers.y - candidate * answers.x
        median = survival_quantile(offsets, answers.complete, answers.weight, 0.5)
        # Predictions are clamped to max_tokens, which the longest truncated answer shows.
        error = lengths - np.exp(np.minimum(median + candidate * answers.x, limit))
        loss = float(answers.weight @ np.where(answers.complete, np.abs(error), np.maximum(error, 0.0)))
        if loss < best * (1.0 - 1e-9):
            best, slope, shift = loss, candidate, median
    residuals = (answers.y - shift - slope * answers.x) / answers.s
    rows = float(answers.weight.sum())
    level = min(0.9 * (rows + 1.0) / rows, 1.0 - 1e-9)
    stretch = survival_quantile(residuals, answers.complete, answers.weight, level)
    return Correction(slope, shift, min(max(stretch, 0.0), _MAX_STRETCH))


def survival_quantile(values: Floats, complete: Flags, weight: Floats, level: float) -> float:
    """Return the Kaplan-Meier quantile at ``level`` of weighted ``values``; incomplete ones are lower bounds.

    S(t) = prod over complete v <= t of (1 - w_v / sum of w over u >= v). The quantile is the smallest complete t with
    S(t) <= 1 - ``level``. If truncated answers keep S above that, it is the largest of ``values``.
    """
    # On equal values, complete answers come first: truncated ones are longer than their value.
    order = np.lexsort((~complete, values))
    values, complete, weight = values[order], complete[order], weight[order]
    at_risk = np.cumsum(weight[::-1])[::-1]
    survival = np.cumprod(np.where(complete, 1.0 - weight / at_risk, 1.0))
    reached = np.flatnonzero(complete & (survival <= 1.0 - level + 1e-12))
    return float(values[reached[0] if len(reached) else -1])
