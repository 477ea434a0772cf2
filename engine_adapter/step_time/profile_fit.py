"""Fits a profile's regimes to measured steps: a monotone piecewise-linear token cost plus linear terms of attention.

    step = base + f(n) + per_prefill_token*p + per_decode*B + per_decode_context*C + per_prefill_context*S
         + per_prefill_pair*pairs + per_decode_step*[B > 0] + per_prefill_step*[p > 0]

f is continuous and non-decreasing: hinges with non-negative slopes between knots, which are chosen greedily.

INVARIANT: all coefficients are at least 0, so more work never makes a fitted step faster.

The loss is the squared relative error, because a policy needs a constant relative accuracy. Decode-only, prefill-only
and mixed steps have equal total weight, although an engine runs many more decode-only steps.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from engine_adapter.step_time.linear_forms import Floats, fit_quality
from engine_adapter.step_time.profile import Profile, Regime

MAX_REGIMES = 16
"""Largest number of regimes of a profile."""
_MIN_KNOT_GAIN = 0.02
"""Minimum reduction of the loss by a knot, as a fraction of the loss."""
_ROUNDING_LOSS = 1e-12
"""A loss (squared relative error) at most this large is rounding; no knot is added below it."""


@dataclass(frozen=True, slots=True)
class Steps:
    """Measured steps; all arrays have shape (steps,). The columns are the arguments of `Profile.step_seconds`."""

    decodes: Floats
    decode_context: Floats
    prefill_tokens: Floats
    prefill_context: Floats
    prefill_chunks: Floats
    seconds: Floats

    @classmethod
    def of(cls, rows: Sequence[Sequence[float]]) -> Steps:
        """Steps from rows of (decodes, decode context, prefill tokens, prefill context, chunks, seconds)."""
        return cls(*np.array(rows, dtype=np.float64).reshape(len(rows), 6).T)

    def __len__(self) -> int:
        return len(self.seconds)

    def where(self, chosen: Any) -> Steps:
        """The rows selected by a boolean mask or an array of indices."""
        return Steps(*(getattr(self, name)[chosen] for name in self.__slots__))

    def predicted(self, profile: Profile) -> Floats:
        """The durations of these steps under ``profile``, in seconds, shape (steps,)."""
        columns = [getattr(self, name).tolist() for name in self.__slots__[:-1]]
        return np.array([profile.step_seconds(*row) for row in zip(*columns, strict=True)])


def split(steps: Steps, held_out: float, seed: int) -> tuple[Steps, Steps]:
    """Split ``steps`` randomly into those to fit and the fraction ``held_out`` for evaluation."""
    order = np.random.default_rng(seed).permutation(len(steps))
    cut = round(len(steps) * (1 - held_out))
    return steps.where(order[:cut]), steps.where(order[cut:])


def quality(profile: Profile, steps: Steps) -> dict[str, dict[str, float]]:
    """R2, RMSE (ms), MAPE (a fraction) and number of samples of ``profile`` on ``steps``, per kind of step.

    The kinds are ``prefill`` (prefill-only), ``itl`` (decode-only) and ``mixed``. The first two match the tables in
    the appendix of the SCORPIO paper. A kind with fewer than two steps is left out.
    """
    predicted = steps.predicted(profile)
    kinds = {
        "prefill": (steps.decodes == 0) & (steps.prefill_tokens > 0),
        "itl": (steps.decodes > 0) & (steps.prefill_tokens == 0),
        "mixed": (steps.decodes > 0) & (steps.prefill_tokens > 0),
    }
    result = {}
    for kind, mask in kinds.items():
        if mask.sum() >= 2:
            fit = fit_quality(predicted[mask], steps.seconds[mask])
            result[kind] = {
                "r2": round(fit.r2, 5),
                "rmse_ms": round(fit.rmse_s * 1000, 3),
                "mape": round(fit.mape, 4),
                "samples": fit.samples,
            }
    return result


def fit_regimes(steps: Steps) -> tuple[Regime, ...]:
    """Fit the regimes of a profile to ``steps``.

    Knots are added greedily. Candidates are quantiles of the step sizes, rounded to whole tiles. The search ends if the
    best knot reduces the loss by less than `_MIN_KNOT_GAIN`, or with `MAX_REGIMES` regimes.

    Raises:
        ValueError: fewer than 20 steps, or a step with a duration of 0.
    """
    if len(steps) < 20:
        raise ValueError(f"{len(steps)} steps are too few to fit a profile")
    if (steps.seconds <= 0).any():
        raise ValueError("a step must take more than 0 seconds")
    tokens = steps.decodes + steps.prefill_tokens
    # All linear columns stay in the fit: correlated columns hide each other's cost if selected one at a time.
    linear = _linear_columns(steps)
    weights = 1.0 / (steps.seconds * np.sqrt(_kind_counts(steps)))
    candidates = _knot_candidates(tokens)
    knots: list[float] = []
    # With few steps, noise alone gives such a gain; 2*log(n)/n is the Bayesian information criterion's penalty for the
    # two parameters of a knot.
    min_gain = max(_MIN_KNOT_GAIN, 2 * float(np.log(len(steps))) / len(steps))
    best_loss, coefficients = _fit(linear, tokens, knots, steps.seconds, weights)
    while candidates and len(knots) + 1 < MAX_REGIMES and best_loss > _ROUNDING_LOSS:
        trials = [(_fit(linear, tokens, sorted([*knots, k]), steps.seconds, weights), k) for k in candidates]
        (loss, trial_coefficients), knot = min(trials, key=lambda trial: trial[0][0])
        if loss > best_loss * (1 - min_gain):
            break
        best_loss, coefficients = loss, trial_coefficients
        knots = sorted([*knots, knot])
        candidates.remove(knot)
    return _regimes(knots, coefficients)


def _kind_counts(steps: Steps) -> Floats:
    """For each step, the number of steps of its kind; shape (steps,)."""
    kind = 2 * (steps.decodes > 0) + (steps.prefill_tokens > 0)
    return np.asarray(np.bincount(kind)[kind], dtype=np.float64)


def _linear_columns(steps: Steps) -> Floats:
    """Columns of the intercept and of `Regime`'s linear terms, in the order of its fields; shape (steps, 8)."""
    pairs = steps.prefill_tokens * (steps.prefill_context + 0.5 * steps.prefill_tokens)
    pairs /= np.maximum(steps.prefill_chunks, 1)
    kinds = (steps.decodes > 0, steps.prefill_tokens > 0)
    columns = (steps.prefill_tokens, steps.decodes, steps.decode_context, steps.prefill_context, pairs, *kinds)
    return np.stack([np.ones(len(steps)), *columns], axis=1)


def _knot_candidates(tokens: Floats) -> list[float]:
    """Possible knots: quantiles of all step sizes and of the distinct step sizes, rounded to whole tiles."""
    levels = np.linspace(0.02, 0.98, 48)
    sizes = np.concatenate([np.quantile(tokens, levels), np.quantile(np.unique(tokens), levels)])
    tile = np.select([sizes < 16, sizes < 64, sizes < 512], [1, 8, 16], 64)
    rounded = np.unique(np.round(sizes / tile) * tile)
    candidates: list[float] = rounded[(rounded > tokens.min()) & (rounded < tokens.max())].tolist()
    return candidates


def _fit(linear: Floats, tokens: Floats, knots: list[float], seconds: Floats, weights: Floats) -> tuple[float, Floats]:
    """The weighted squared loss, and the coefficients: those of ``linear``, then one slope per regime."""
    lows = np.array([0.0, *knots])
    hinges = np.clip(tokens[:, None] - lows, 0.0, np.diff([*lows, np.inf]))
    columns = np.concatenate([linear, hinges], axis=1) * weights[:, None]
    target = seconds * weights
    coefficients = nonnegative(columns, target)
    residual = columns @ coefficients - target
    return float(residual @ residual), coefficients


def _regimes(knots: list[float], coefficients: Floats) -> tuple[Regime, ...]:
    linear = coefficients[1:8].tolist()
    regimes = []
    low, height = 0.0, float(coefficients[0])
    for high, slope in zip([*knots, np.inf], coefficients[8:].tolist(), strict=True):
        # The line through (low, height), in terms of its intercept at 0.
        regimes.append(Regime(high, height - slope * low, slope, *linear))
        if np.isfinite(high):
            low, height = high, height + slope * (high - low)
    return tuple(regimes)


def nonnegative(columns: Floats, target: Floats) -> Floats:
    """argmin over w >= 0 of ||columns @ w - target||, by Lawson and Hanson's active-set method on the normal equations.

    For any k. (`linear_forms.nonnegative_least_squares` tries all 2^k supports and needs a small k.)

    Args:
        columns: shape (samples, k).
        target: shape (samples,).

    Returns:
        w, shape (k,).
    """
    scale = np.sqrt((columns**2).sum(axis=0))
    scale[scale == 0] = 1.0
    scaled = columns / scale
    gram, moment = scaled.T @ scaled, scaled.T @ target
    k = len(moment)
    w, free = np.zeros(k), np.zeros(k, dtype=bool)
    tolerance = 1e-10 * max(float(np.abs(moment).max()), 1e-300)
    for _ in range(10 * k):
        gradient = moment - gram @ w
        gradient[free] = -np.inf
        if gradient.max() <= tolerance:
            break
        free[int(gradient.argmax())] = True
        while True:
            solution = np.zeros(k)
            solution[free] = np.linalg.lstsq(gram[np.ix_(free, free)], moment[free], rcond=1e-12)[0]
            if (solution[free] > 0).all():
                w = solution
                break
            # Move towards the solution until the first coefficient reaches 0, and remove that one from the free set.
            blocked = free & (solution <= 0)
            step = float((w[blocked] / np.maximum(w[blocked] - solution[blocked], 1e-300)).min())
            w = w + step * (solution - w)
            free &= w > 1e-14
            w[~free] = 0.0
    return np.asarray(w / scale, dtype=np.float64)
