"""From predicted to observed scale: one correction of the two quantiles, fitted to answers that have finished.

With x = ln p50 and s = ln(p90 / p50) as the model predicted them and y the answer's length, what is served is

    ln p50' = a + b x,          ln p90' = ln p50' + q s.

b is the slope of a grid that leaves the least absolute error in tokens (a model that ranks another's answers well still
spreads them too far or too little; b = 0 is the constant median, so a prediction that says nothing is not listened to).
For each b, a is the median of ln y - b x, and q the 0.9 (n + 1) / n quantile of (ln y - ln p50') / s: split conformal
prediction on normalised residuals, so that the next answer is within p90' with a probability of 0.9 whatever the
lengths' distribution (Lei et al. 2018, section 5.2; Romano et al. 2019). An answer that ``max_tokens`` cut off says "at
least so long": quantiles are Kaplan-Meier's, and such an answer costs b only what its prediction fell short by.
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
"""In doubt the first: the length model's own."""

LEAST_SPREAD = 0.1
"""s below this is no spread: q would be anything."""

_Q_MOST = 20.0
_LOG_MOST = math.log(MAX_TOKENS)


@dataclass(slots=True, frozen=True)
class Answers:
    """Finished answers beside what was predicted of them, each of shape (rows,).

    ``x`` = ln p50 and ``s`` = ln(p90 / p50) as predicted, ``y`` = ln of the length (all in tokens), ``ended``: False
    where the length is a lower bound, ``weight``: how many answers this one stands for.
    """

    x: Floats
    s: Floats
    y: Floats
    ended: Flags
    weight: Floats


@dataclass(slots=True, frozen=True)
class Correction:
    """``slope`` b, ``shift`` a and ``stretch`` q of the module's equation."""

    slope: float
    shift: float
    stretch: float

    def apply(self, predicted: Prediction) -> Prediction:
        """The corrected quantiles, before any clamp; the point estimate becomes the median."""
        x, s = log_scale(predicted.p50, predicted.p90)
        middle = min(max(self.shift + self.slope * x, 0.0), _LOG_MOST)
        p50 = math.exp(middle)
        return Prediction(length=p50, p50=p50, p90=math.exp(min(middle + self.stretch * s, _LOG_MOST)))


def log_scale(p50: float, p90: float) -> tuple[float, float]:
    """x and s of predicted quantiles (tokens)."""
    x = math.log(max(p50, 1.0))
    return x, max(math.log(max(p90, 1.0)) - x, LEAST_SPREAD)


def fit_correction(answers: Answers) -> Correction:
    """The correction that fits ``answers`` (at least one row) best; see the module."""
    lengths = np.exp(answers.y)
    limit = _LOG_MOST if answers.ended.all() else float(answers.y[~answers.ended].max())
    least = math.inf
    slope = shift = 0.0
    for candidate in SLOPES:
        offsets = answers.y - candidate * answers.x
        median = survival_quantile(offsets, answers.ended, answers.weight, 0.5)
        # A prediction is served within its request's limit; what was cut off tells where that is.
        error = lengths - np.exp(np.minimum(median + candidate * answers.x, limit))
        loss = float(answers.weight @ np.where(answers.ended, np.abs(error), np.maximum(error, 0.0)))
        if loss < least * (1.0 - 1e-9):
            least, slope, shift = loss, candidate, median
    residuals = (answers.y - shift - slope * answers.x) / answers.s
    rows = float(answers.weight.sum())
    level = min(0.9 * (rows + 1.0) / rows, 1.0 - 1e-9)
    stretch = survival_quantile(residuals, answers.ended, answers.weight, level)
    return Correction(slope, shift, min(max(stretch, 0.0), _Q_MOST))


def survival_quantile(values: Floats, ended: Flags, weight: Floats, level: float) -> float:
    """The ``level`` quantile of weighted ``values``, those not ``ended`` being lower bounds (Kaplan-Meier).

    S(t) = prod over ended v <= t of (1 - w_v / sum of w over u >= v);  the least ended t with S(t) <= 1 - level. Where
    so much is cut off that S stays above, the greatest value of all.
    """
    # At one value, what ended comes before what was cut off: the latter is longer.
    order = np.lexsort((~ended, values))
    values, ended, weight = values[order], ended[order], weight[order]
    at_risk = np.cumsum(weight[::-1])[::-1]
    survival = np.cumprod(np.where(ended, 1.0 - weight / at_risk, 1.0))
    reached = np.flatnonzero(ended & (survival <= 1.0 - level + 1e-12))
    return float(values[reached[0] if len(reached) else -1])
