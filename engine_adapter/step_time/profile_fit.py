"""From measured steps to a profile's regimes: a monotone piecewise-linear cost of tokens plus attention's linear terms.

    step = base + f(n) + per_prefill_token*p + per_decode*B + per_decode_context*C + per_prefill_context*S
         + per_prefill_pair*pairs + per_decode_step*[B > 0] + per_prefill_step*[p > 0]

f is continuous and never falls: hinges with non-negative slopes between knots that are chosen one by one, each where it
explains most. All coefficients are at least 0, so that no fitted step gets faster by having more to do. Errors count
relative to the step's time, for a policy that aims at a deadline cares about per cent; and steps that only decode, only
prefill, and do both count the same in sum, though an engine runs many more of the first.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from engine_adapter.step_time.linear_forms import Floats, fit_quality
from engine_adapter.step_time.profile import Profile, Regime

MAX_REGIMES = 16
_WORTH_A_KNOT = 0.02
"""A knot must take away this share of the loss."""
_PERFECT = 1e-12
"""A mean squared relative error that is rounding."""


@dataclass(frozen=True, slots=True)
class Steps:
    """Timed steps, one per row; all arrays of shape (steps,). The columns are `Profile.step_seconds`' arguments."""

    decodes: Floats
    decode_context: Floats
    prefill_tokens: Floats
    prefill_context: Floats
    prefill_chunks: Floats
    seconds: Floats

    @classmethod
    def of(cls, rows: Sequence[Sequence[float]]) -> Steps:
        """From rows of (decodes, decode context, prefill tokens, prefill context, chunks, seconds)."""
        return cls(*np.array(rows, dtype=np.float64).reshape(len(rows), 6).T)

    def __len__(self) -> int:
        return len(self.seconds)

    def where(self, chosen: Any) -> Steps:
        """The rows that a boolean mask or an array of indices chooses."""
        return Steps(*(getattr(self, name)[chosen] for name in self.__slots__))

    def predicted(self, profile: Profile) -> Floats:
        """What ``profile`` says about these steps, in seconds."""
        columns = [getattr(self, name).tolist() for name in self.__slots__[:-1]]
        return np.array([profile.step_seconds(*row) for row in zip(*columns, strict=True)])


def split(steps: Steps, held_out: float, seed: int) -> tuple[Steps, Steps]:
    """``steps`` in two by chance: those to fit, and the share ``held_out`` to judge the fit by."""
    order = np.random.default_rng(seed).permutation(len(steps))
    cut = round(len(steps) * (1 - held_out))
    return steps.where(order[:cut]), steps.where(order[cut:])


def quality(profile: Profile, steps: Steps) -> dict[str, dict[str, float]]:
    """R2, RMSE (ms), MAPE (a fraction) and the number of steps: those that only prefill, only decode, and do both.

    ``prefill`` and ``itl`` are the two tables of the SCORPIO paper's appendix.
    """
    predicted = steps.predicted(profile)
    kinds = {
        "prefill": (steps.decodes == 0) & (steps.prefill_tokens > 0),
        "itl": (steps.decodes > 0) & (steps.prefill_tokens == 0),
        "mixed": (steps.decodes > 0) & (steps.prefill_tokens > 0),
    }
    found = {}
    for kind, chosen in kinds.items():
        if chosen.sum() >= 2:
            fit = fit_quality(predicted[chosen], steps.seconds[chosen])
            found[kind] = {
                "r2": round(fit.r2, 5),
                "rmse_ms": round(fit.rmse_s * 1000, 3),
                "mape": round(fit.mape, 4),
                "samples": fit.samples,
            }
    return found


def fit_regimes(steps: Steps, max_regimes: int = MAX_REGIMES) -> tuple[Regime, ...]:
    """The regimes that fit ``steps`` best in relative error.

    Knots are added greedily, among quantiles of the steps' sizes rounded to whole tiles, until the next one would take
    away less than a fiftieth of the loss or there are ``max_regimes`` regimes.

    Raises:
        ValueError: fewer than 20 steps, or one that took no time.
    """
    if len(steps) < 20:
        raise ValueError(f"{len(steps)} steps are too few to fit a profile to")
    if (steps.seconds <= 0).any():
        raise ValueError("a step must take more than 0 seconds")
    tokens = steps.decodes + steps.prefill_tokens
    # Two columns that rise together hide each other's cost when one is tried alone, so all of attention's always stay.
    fixed = _attention(steps)
    weights = 1.0 / (steps.seconds * np.sqrt(_alike(steps)))
    candidates = _candidates(tokens)
    knots: list[float] = []
    # Among few steps, noise alone takes as much away: the Bayesian information criterion's price of two parameters.
    worth = max(_WORTH_A_KNOT, 2 * float(np.log(len(steps))) / len(steps))
    best, found = _fit(fixed, tokens, knots, steps.seconds, weights)
    while candidates and len(knots) + 1 < max_regimes and best > _PERFECT:
        tries = [(_fit(fixed, tokens, sorted([*knots, k]), steps.seconds, weights), k) for k in candidates]
        (loss, with_knot), knot = min(tries, key=lambda t: t[0][0])
        if loss > best * (1 - worth):
            break
        best, found = loss, with_knot
        knots = sorted([*knots, knot])
        candidates.remove(knot)
    return _regimes(knots, found)


def _alike(steps: Steps) -> Floats:
    """How many steps are of each one's kind."""
    kind = 2 * (steps.decodes > 0) + (steps.prefill_tokens > 0)
    return np.asarray(np.bincount(kind)[kind], dtype=np.float64)


def _attention(steps: Steps) -> Floats:
    pairs = steps.prefill_tokens * (steps.prefill_context + 0.5 * steps.prefill_tokens)
    pairs /= np.maximum(steps.prefill_chunks, 1)
    kinds = (steps.decodes > 0, steps.prefill_tokens > 0)
    columns = (steps.prefill_tokens, steps.decodes, steps.decode_context, steps.prefill_context, pairs, *kinds)
    return np.stack([np.ones(len(steps)), *columns], axis=1)


def _candidates(tokens: Floats) -> list[float]:
    """Where a knot may be: among the steps' sizes, some by how often they occur and some evenly; whole tiles."""
    shares = np.linspace(0.02, 0.98, 48)
    inside = np.concatenate([np.quantile(tokens, shares), np.quantile(np.unique(tokens), shares)])
    tile = np.select([inside < 16, inside < 64, inside < 512], [1, 8, 16], 64)
    rounded = np.unique(np.round(inside / tile) * tile)
    found: list[float] = rounded[(rounded > tokens.min()) & (rounded < tokens.max())].tolist()
    return found


def _fit(fixed: Floats, tokens: Floats, knots: list[float], seconds: Floats, weights: Floats) -> tuple[float, Floats]:
    """The weighted squared loss and the coefficients: those of ``fixed``, then one slope a regime."""
    lows = np.array([0.0, *knots])
    hinges = np.clip(tokens[:, None] - lows, 0.0, np.diff([*lows, np.inf]))
    columns = np.concatenate([fixed, hinges], axis=1) * weights[:, None]
    target = seconds * weights
    found = nonnegative(columns, target)
    residual = columns @ found - target
    return float(residual @ residual), found


def _regimes(knots: list[float], found: Floats) -> tuple[Regime, ...]:
    # In the order of `Regime`'s fields, as `_attention` has its columns.
    linear = found[1:8].tolist()
    regimes = []
    low, height = 0.0, float(found[0])
    for high, slope in zip([*knots, np.inf], found[8:].tolist(), strict=True):
        # The line through (low, height), told by its intercept.
        regimes.append(Regime(high, height - slope * low, slope, *linear))
        if np.isfinite(high):
            low, height = high, height + slope * (high - low)
    return tuple(regimes)


def nonnegative(columns: Floats, target: Floats) -> Floats:
    """argmin over w >= 0 of ||columns @ w - target||, by Lawson and Hanson's active sets on the normal equations.

    ``columns``: shape (samples, k) with any k (`step_time.nonnegative_least_squares` tries all 2^k supports, which is
    for small k); ``target``: shape (samples,). Returns shape (k,).
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
            tried = np.zeros(k)
            tried[free] = np.linalg.lstsq(gram[np.ix_(free, free)], moment[free], rcond=1e-12)[0]
            if (tried[free] > 0).all():
                w = tried
                break
            # Go towards it until the first coefficient meets 0, and leave that one out.
            blocked = free & (tried <= 0)
            step = float((w[blocked] / np.maximum(w[blocked] - tried[blocked], 1e-300)).min())
            w = w + step * (tried - w)
            free &= w > 1e-14
            w[~free] = 0.0
    return np.asarray(w / scale, dtype=np.float64)
