"""SCORPIO's two analytic forms of the time of an engine step, and their least-squares fits.

Inter-token latency of a decode-only step (SCORPIO eq. 4) with B sequences of mean length L:

    ITL(B, L) = a*B*L + b*B + c*L + d

Prefill time of a prompt of p tokens (eq. 6):

    t(p) = delta if p < theta else alpha*p + beta

All times are in seconds, lengths in tokens.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import combinations

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]


@dataclass(slots=True, frozen=True)
class FitQuality:
    """Quality of a fit: R2, RMSE (s), MAPE (a fraction) and the number of samples."""

    r2: float
    rmse_s: float
    mape: float
    samples: int


@dataclass(slots=True, frozen=True)
class StepTimes:
    """Coefficients of both forms. The defaults are conservative values for a small model, used until data arrives."""

    a: float = 0.0
    b: float = 3e-4
    c: float = 0.0
    d: float = 1e-2
    alpha: float = 3e-4
    beta: float = 0.0
    theta: float = 0.0
    delta: float = 0.0

    def itl(self, batch: float, length: float) -> float:
        """ITL(B, L) in seconds. ``batch`` may be a virtual batch size."""
        return (self.a * batch + self.c) * length + self.b * batch + self.d

    def prefill(self, tokens: float) -> float:
        """t(p) in seconds."""
        return self.delta if tokens < self.theta else self.alpha * tokens + self.beta


def nonnegative_least_squares(columns: Floats, target: Floats, parsimonious: bool = True) -> Floats:
    """argmin over w >= 0 of ||columns @ w - target||, by exhaustive search over supports.

    It solves least squares for every subset of columns (2^k solves, for k <= 4) and keeps the best feasible solution,
    unless that of all columns must be the best one.

    Args:
        columns: shape (samples, k).
        target: shape (samples,).
        parsimonious: minimise the Bayesian information criterion, n*log(loss/n) + size*log(n), instead of the loss.
            Otherwise a few noisy steps of similar lengths produce a slope that is wrong at other lengths.

    Returns:
        w, shape (k,).
    """
    samples, k = columns.shape
    # With the normal equations, the cost of each subset does not depend on the number of samples.
    scale = np.sqrt((columns**2).mean(axis=0))
    scale[scale == 0] = 1.0
    scaled = columns / scale
    gram, moment, energy = scaled.T @ scaled, scaled.T @ target, float(target @ target)
    if not parsimonious:
        # The loss is convex, so a feasible least-squares solution is the best one. It must be the only one.
        w, _, rank, _ = np.linalg.lstsq(gram, moment, rcond=1e-10)
        if rank == k and (w >= 0).all():
            return np.asarray(w / scale, dtype=np.float64)
    best, best_criterion = np.zeros(k), np.inf
    for size in range(1, k + 1):
        for support in combinations(range(k), size):
            rows = list(support)
            w = np.linalg.lstsq(gram[np.ix_(rows, rows)], moment[rows], rcond=1e-10)[0]
            if (w < 0).any():
                continue
            loss = energy - 2 * float(w @ moment[rows]) + float(w @ gram[np.ix_(rows, rows)] @ w)
            # Rounding leaves a loss of about 1e-12 of the energy in a perfect fit. Smaller losses carry no information.
            criterion = samples * np.log(max(loss, 1e-12 * energy, 1e-300) / samples)
            criterion += size * np.log(samples) if parsimonious else 0.0
            if criterion < best_criterion - 1e-9:
                best_criterion, best = criterion, np.zeros(k)
                best[rows] = w
    return np.asarray(best / scale, dtype=np.float64)


def _two_columns(a: float, b: float, d: float, m: float, n: float) -> tuple[float, float]:
    """Return argmin over w >= 0 of w'Gw - 2 w'm, for G = ((a, b), (b, d)) and m = (m, n).

    `fit_prefill` needs a dozen of these, and each call of LAPACK takes 20 us for two numbers.
    """
    middle, radius = (a + d) / 2, math.hypot((a - d) / 2, b)
    if middle - radius > 1e-10 * (middle + radius):
        # Both eigenvalues count, so there is one solution. The loss is convex: no other is better, if it is feasible.
        determinant = a * d - b * b
        w, v = (d * m - b * n) / determinant, (a * n - b * m) / determinant
        if w >= 0 and v >= 0:
            return w, v
    # One column alone lowers the loss by m^2 / a, if its weight is positive.
    alone, other = (max(x, 0.0) ** 2 / y if y > 0 else 0.0 for x, y in ((m, a), (n, d)))
    if alone == other == 0.0:
        return 0.0, 0.0
    # Prompts of one length give both columns the same loss, except for rounding. Then the first one counts.
    return (m / a, 0.0) if alone >= other * (1 - 1e-9) else (0.0, n / d)


def median(values: Floats) -> float:
    """Return the median of one value or more. `np.median` takes several times as long for hundreds of values."""
    half = len(values) // 2
    middle = (half,) if len(values) % 2 else (half - 1, half)
    return float(np.partition(values, middle)[list(middle)].mean())


def fit_quality(predicted: Floats, actual: Floats) -> FitQuality:
    """R2, RMSE and MAPE of ``predicted`` against ``actual`` (both shape (samples,), seconds)."""
    residual = actual - predicted
    variance = float(((actual - actual.mean()) ** 2).sum())
    return FitQuality(
        r2=1.0 - float((residual**2).sum()) / variance if variance > 0 else 0.0,
        rmse_s=float(np.sqrt((residual**2).mean())),
        mape=float((np.abs(residual) / np.maximum(np.abs(actual), 1e-9)).mean()),
        samples=len(actual),
    )


_PRIOR_SHARE = 1e-3
"""Weight of the prior in `fit_itl`, as a fraction of the number of steps."""
_PRIOR_STEPS = 3.0
"""Minimum weight of the prior in `fit_itl`, in steps."""


def fit_itl(
    batch: Floats, length: Floats, seconds: Floats, prior: StepTimes | None = None
) -> tuple[float, float, float, float]:
    """Coefficients (a, b, c, d) of eq. 4.

    INVARIANT: all are at least 0, so a longer or larger batch is never predicted to be faster.

    Steps of equal size do not separate the cost per sequence from the fixed cost. ``prior``, scaled to the mean of
    ``seconds``, then determines the ratio. Without it, an hour of single requests would teach that a batch of 64 takes
    64 times as long, or just as long. If ``prior`` is None, columns that do not reduce the loss enough are left out.
    """
    columns = np.stack([batch * length, batch, length, np.ones_like(batch)], axis=1)
    if prior is not None:
        center = np.array([prior.a, prior.b, prior.c, prior.d])
        expected = float((columns @ center).sum())
        center *= float(seconds.sum()) / expected if expected > 0 else 0.0
        # Ridge regression towards `center` as four more rows, each scaled by its column's root mean square.
        weight = max(_PRIOR_SHARE * len(batch), _PRIOR_STEPS)
        strength = np.sqrt(weight * (columns**2).mean(axis=0))
        columns = np.concatenate([columns, np.diag(strength)])
        seconds = np.concatenate([seconds, strength * center])
    a, b, c, d = nonnegative_least_squares(columns, seconds, parsimonious=prior is None)
    return float(a), float(b), float(c), float(d)


_FIXED_COST_TOKENS = StepTimes().d / StepTimes().alpha
"""Prompt tokens that take as long as the fixed cost of a step, a priori. It decides what equal prompts teach: the time
of longer ones is mostly that of their tokens, the time of shorter ones mostly fixed cost (network, step overhead)."""

_LEAST_NOISE = 0.01
"""Least noise of a step time, relative to the root mean square of all of them; keeps exact samples solvable."""


def fit_prefill(tokens: Floats, seconds: Floats, prior: StepTimes | None = None) -> tuple[float, float, float, float]:
    """Coefficients (alpha, beta, theta, delta) of eq. 6. theta is the best of 0 and five quantiles of ``tokens``.

    Prompts of similar lengths do not separate the time per token from the fixed cost. With ``prior``, samples count by
    their information: the fit is the mode of the posterior under Gaussian noise, whose variance is that of the
    residuals. The prior of alpha and beta is centred at ``prior``. Its deviation of alpha*p equals that of beta for
    prompts of `_FIXED_COST_TOKENS` tokens, and their sum is as large as the times themselves.

    ``tokens`` and ``seconds``: shape (samples,).
    """
    order = np.argsort(tokens)
    tokens, seconds = tokens[order], seconds[order]
    # Sums over the first samples. Those of any theta are differences of two of them.
    powers = np.stack([np.ones_like(tokens), tokens, tokens**2, seconds, tokens * seconds, seconds**2])
    sums = np.concatenate([np.zeros((6, 1)), np.cumsum(powers, axis=1)], axis=1)
    places = np.arange(len(tokens))
    thetas = np.unique([0.0, *np.interp((len(tokens) - 1) * _THETA_QUANTILES, places, tokens)])
    best = (0.0, 0.0, 0.0, 0.0)
    best_loss = np.inf
    for theta, at in zip(thetas.tolist(), np.searchsorted(tokens, thetas).tolist(), strict=True):
        if len(tokens) - at < 2:
            continue
        below, of = sums[:, at].tolist(), (sums[:, -1] - sums[:, at]).tolist()
        alpha, beta = _fit_line(of, prior)
        delta = below[3] / at if at else 0.0
        loss = _loss(of, alpha, beta) + below[5] - at * delta**2
        if loss < best_loss * (1 - 1e-3):
            best_loss, best = loss, (alpha, beta, theta, delta)
    return best


_THETA_QUANTILES = np.array([0.1, 0.2, 0.3, 0.4, 0.5])

_Sums = list[float]
"""Of the samples with p tokens and t seconds: their number, and the sums of p, p^2, t, p*t and t^2."""


def _fit_line(of: _Sums, prior: StepTimes | None) -> tuple[float, float]:
    """Return alpha and beta, both at least 0, of t = alpha*p + beta."""
    count, tokens, squares, seconds, products, energy = of
    alpha, beta = _scaled(squares, tokens, count, products, seconds)
    if prior is None or energy <= 0:
        return alpha, beta
    mean_energy = energy / count
    noise = _loss(of, alpha, beta) / count + _LEAST_NOISE**2 * mean_energy
    deviation = math.sqrt(mean_energy) / (tokens / count + _FIXED_COST_TOKENS)
    # Two more samples: the prior of alpha, and that of beta.
    of_alpha, of_beta = noise / deviation**2, noise / (deviation * _FIXED_COST_TOKENS) ** 2
    return _scaled(
        squares + of_alpha, tokens, count + of_beta, products + of_alpha * prior.alpha, seconds + of_beta * prior.beta
    )


def _scaled(a: float, b: float, d: float, m: float, n: float) -> tuple[float, float]:
    """Return argmin over w >= 0 of w'Gw - 2 w'm with G = ((a, b), (b, d)) and m = (m, n), for unlike columns."""
    first, second = math.sqrt(a) or 1.0, math.sqrt(d) or 1.0
    between = b / (first * second)
    w, v = _two_columns(a / first**2, between, d / second**2, m / first, n / second)
    return w / first, v / second


def _loss(of: _Sums, alpha: float, beta: float) -> float:
    """Return the squared error of t = alpha*p + beta; at least 0, although it is a small difference of large sums."""
    count, tokens, squares, seconds, products, energy = of
    fitted = alpha * (alpha * squares + 2 * beta * tokens - 2 * products) + beta * (beta * count - 2 * seconds)
    return max(energy + fitted, 0.0)
