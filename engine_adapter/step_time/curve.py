"""The step curve: step time as a piecewise linear function of the tokens in a step, learned online.

A step of D decodes, whose contexts sum to C tokens, and p prompt tokens takes

    T(D, C, p) = f(D + p) + a*C + e*p + h*[p > 0]

with f piecewise linear between `KNOTS`. While memory bandwidth limits a step, more tokens cost almost nothing; each new
wave of GPU tiles adds a jump. A single slope (SCORPIO's eq. 4 and 6) wastes the almost free tokens, and makes steps
that cost more than they compute.

`refitted` fits f by weighted least squares, with a penalty on changes of slope that the previous curve did not have.
Where there are no samples, the curve keeps its shape and is scaled to the speed of the latest steps.

That speed is a median, but least squares fit skewed times below or above their median. A refit scales the part without
samples by this difference, and corrects only the part with samples. Repeated, that grows without bound: with
exponential times by half at every refit. So `StepCurve.drift` accumulates the differences, and `refitted` divides the
speed by what exceeds `MAX_DRIFT`. From then on, both parts move by the same factor.

All times in seconds, sizes in tokens.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from engine_adapter.step_time.linear_forms import Floats, StepTimes, median

KNOTS: Floats = np.array(
    [0, 1, 4, 8, 16, 24, 32, 48, 64, 80, 96, 112, 128, 144, 160, 176, 192, 224, 256, 288, 320, 352, 384, 448, 512, 640,
     768, 1024, 1536, 2048, 4096, 8192, 65536], dtype=np.float64
)  # fmt: skip
"""Tokens in a step at which f may change its slope. Dense for small steps, where jumps matter most."""

WORTH = 0.8
"""Least tokens per second for which slack is spent now, as a share of what the same second computes later."""

SPENT = 0.8
"""Share of the available time that a chunk may take by prediction, so its true cost may be 1/`SPENT` times higher."""

_TYPICAL_BATCH = 16
"""Sequences in a batch for which SCORPIO's cost per mean context length is converted to a cost per context token."""

_STIFFNESS = 1.0
"""Weight of a change of slope at a knot, in steps: as many contradicting steps move it half-way."""

_KNOT_MEMORY = 3e-4
"""Weight of the previous value at a knot, in steps. Small: without samples the slopes are kept, not the values."""

_PRIOR_STEPS = 3.0
"""Weight of the previous a, e and h, in steps (as in `linear_forms.fit_itl`)."""

MAX_DRIFT = 2.0
"""Bound of `StepCurve.drift`, as a factor up or down.

Step times with 5% jitter stay within it, so it changes nothing for them. Exponential times reach it in two refits.
"""


@dataclass(slots=True, frozen=True)
class _Slopes:
    """Least prefill cost per token, in steps of at most a given number of tokens.

    ``sizes``: tokens in a step, shape (k,). ``slopes``: least seconds per prompt token beside `KNOTS` decodes in steps
    of that size or larger, shape (knots, k). ``taken``: f(n) + e*n at `KNOTS`, made non-decreasing. ``lists``: the
    three as lists of floats.
    """

    sizes: Floats
    slopes: Floats
    taken: Floats
    lists: tuple[list[float], list[list[float]], list[float]]


@dataclass(slots=True, frozen=True)
class StepCurve:
    """f at `KNOTS` (s, shape (knots,)), and the coefficients a, e and h of T(D, C, p).

    ``drift``: product of the median ratios of observed to fitted times that the refits left. The next refit scales the
    part without samples by the latest one, so this is how far it is, or will be, scaled away from the observed part.
    """

    at_knots: Floats
    a: float
    e: float
    h: float
    drift: float = field(default=1.0, compare=False)
    _knots: list[float] = field(init=False, repr=False, compare=False)
    _values: list[float] = field(init=False, repr=False, compare=False)
    _slopes: dict[int, _Slopes] = field(init=False, repr=False, compare=False, default_factory=dict)
    _latest: dict[tuple[float, int, float], float] = field(init=False, repr=False, compare=False, default_factory=dict)
    """The latest result of `prefill_token_s`: a decision asks for a batch, and again once it has admitted it."""

    def __post_init__(self) -> None:
        # Lists of floats: indexing an array for a single value is slow.
        object.__setattr__(self, "_knots", KNOTS.tolist())
        object.__setattr__(self, "_values", self.at_knots.tolist())

    @classmethod
    def of(cls, times: StepTimes) -> StepCurve:
        """Return the curve of SCORPIO's two forms: one slope for decodes, another for prompt tokens.

        A prompt alone takes t(p) of eq. 6, which includes the fixed cost d of a step. theta and delta are ignored, and
        c*L is converted to a cost per context token in a batch of `_TYPICAL_BATCH`.
        """
        fixed = max(times.beta - times.d, 0.0)
        return cls(times.d + times.b * KNOTS, times.a + times.c / _TYPICAL_BATCH, times.alpha - times.b, fixed)

    def step_s(self, decodes: float, context: float, prefill: float = 0.0) -> float:
        """Return T(D, C, p); 0 for a step without tokens."""
        tokens = decodes + prefill
        if tokens <= 0:
            return 0.0
        seconds = self._f(tokens) + self.a * context
        return seconds + self.e * prefill + self.h if prefill else seconds

    def steps_s(self, decodes: Floats, context: Floats, prefill: Floats | None = None) -> Floats:
        """Return T(D, C, p) for arrays of shape (n,)."""
        if prefill is None:
            return np.interp(decodes, KNOTS, self.at_knots) + self.a * context
        seconds = np.interp(decodes + prefill, KNOTS, self.at_knots) + self.a * context
        return np.asarray(seconds + self.e * prefill + self.h * np.greater(prefill, 0), dtype=np.float64)

    def prefill_token_s(self, decodes: float, max_tokens: int, spare_s: float = 0.0) -> float:
        """Return mu(D): seconds per prompt token beside D decodes, in chunks that take ``spare_s`` or more.

        This is the least slope from T(D, C, 0) to T(D, C, p) over such p, that is, the long-run cost of prefill, since
        steps may alternate. Smaller chunks may be cheaper per token, but each fills a step of its own: they cannot fill
        the spare seconds of one step. ``max_tokens`` is the token budget of a step.
        """
        asked = decodes, max_tokens, spare_s
        latest = self._latest.get(asked)
        if latest is not None:
            return latest
        knots = self._knots
        sizes, slopes, taken = self._least_slopes(max_tokens).lists
        filled = _interpolate(_interpolate(decodes, knots, taken) + (spare_s - self.h), taken, knots)
        at = bisect_left(sizes, filled if filled < max_tokens else max_tokens)
        right = bisect_left(knots, decodes, 1, len(knots) - 1)
        left = right - 1
        share = (decodes - knots[left]) / (knots[right] - knots[left])
        at_left = slopes[left][at]
        self._latest.clear()
        token_s = self._latest[asked] = at_left + share * (slopes[right][at] - at_left)
        return token_s

    def prefill_tokens_s(self, decodes: Floats, max_tokens: int, spare_s: Floats | float = 0.0) -> Floats:
        """Return `prefill_token_s` for arrays of shape (n,)."""
        if len(decodes) == 1:  # for one request the scalar version takes a tenth of the time
            return np.array([self.prefill_token_s(float(decodes[0]), max_tokens, float(np.ravel(spare_s)[0]))])
        known = self._least_slopes(max_tokens)
        sizes, slopes, taken = known.sizes, known.slopes, known.taken
        filled = np.interp(np.interp(decodes, KNOTS, taken) + (spare_s - self.h), taken, KNOTS)
        at = np.searchsorted(sizes, np.minimum(filled, max_tokens))
        right = np.minimum(np.maximum(np.searchsorted(KNOTS, decodes), 1), len(KNOTS) - 1)
        left = right - 1
        share = (decodes - KNOTS[left]) / (KNOTS[right] - KNOTS[left])
        at_left = slopes[left, at]
        return np.asarray(at_left + share * (slopes[right, at] - at_left), dtype=np.float64)

    def chunk(self, decodes: float, context: float, within_s: float, pace_s: float, backlog: int) -> int:
        """Return how many of ``backlog`` prompt tokens to compute in a step that should end within ``within_s``.

        Slack that is not spent now can be spent later, but only as much of it as steps of ``pace_s`` leave. So a second
        of slack has a price: the slope of the concave hull of tokens over the seconds that they add (steps may
        alternate), at pace_s - T(D, C, 0). The chunk p is the most valuable one that fits:

            max of p - WORTH * price * (T(D, C, p) - T(D, C, 0))   with   T(D, C, p) - T(D, C, 0) <= SPENT * spare,

        or 0 if no chunk has a positive value. With plenty of slack, the price is 0 and prefill gets all time up to the
        pace: unused time is lost, and only larger chunks show whether prompt tokens cost less than the curve predicts.
        """
        alone = self.step_s(decodes, context)
        spare = SPENT * (within_s - alone)
        if spare <= 0:
            return 0
        costs = self._costs(decodes, backlog)
        price = WORTH * _price(pace_s - alone, costs)
        return int(max([(0.0, 0.0), *((p - price * cost, p) for p, cost in _within(spare, costs))])[1])

    def fitting(self, decodes: float, context: float, within_s: float, backlog: int) -> int:
        """Return how many of ``backlog`` prompt tokens fit in a step of ``within_s`` by prediction."""
        spare = within_s - self.step_s(decodes, context)
        if spare <= 0:
            return 0
        return int(max([(0.0, 0.0), *_within(spare, self._costs(decodes, backlog))])[0])

    def _f(self, tokens: float) -> float:
        knots, values = self._knots, self._values
        # Beyond the last knot, the last slope continues.
        at = bisect_left(knots, tokens, 1, len(knots) - 1)
        left, right = knots[at - 1], knots[at]
        return values[at - 1] + (values[at] - values[at - 1]) * (tokens - left) / (right - left)

    def _costs(self, decodes: float, max_tokens: int) -> list[tuple[float, float]]:
        """Return (tokens, seconds added to a step) of the chunks at which the slope changes, and of ``max_tokens``.

        Seconds never decrease. Because of noise in the samples, the curve itself may decrease.
        """
        alone = self._f(decodes) if decodes > 0 else 0.0
        e, base = self.e, self.h - alone
        corners: list[tuple[float, float]] = []
        seconds = 1e-9
        for knot, value in zip(self._knots, self._values, strict=True):
            if decodes < knot < decodes + max_tokens:
                seconds = max(seconds, value + e * (knot - decodes) + base)
                corners.append((knot - decodes, seconds))
        if max_tokens > 0:
            corners.append((max_tokens, max(seconds, self._f(decodes + max_tokens) + e * max_tokens + base)))
        return corners

    def _least_slopes(self, max_tokens: int) -> _Slopes:
        """Return the slopes for a token budget of ``max_tokens``. Computed once for each budget."""
        if max_tokens in self._slopes:
            return self._slopes[max_tokens]
        sizes = np.append(KNOTS[max_tokens > KNOTS], max_tokens)
        alone = np.where(KNOTS > 0, self.at_knots, 0.0)
        prefill = sizes[None, :] - KNOTS[:, None]
        added = np.interp(sizes, KNOTS, self.at_knots)[None, :] - alone[:, None] + self.h
        slope = np.divide(added, prefill, out=np.full_like(prefill, np.inf), where=prefill > 0) + self.e
        least = np.minimum.accumulate(slope[:, ::-1], axis=1)[:, ::-1]
        # A batch that fills the budget has no slope: use that of the largest batch that leaves tokens for prefill.
        fitting = len(sizes) - 1
        least[fitting:] = least[fitting - 1]
        # Because of noise in the samples, a slope may be negative.
        least = np.maximum(least, 0.0)
        taken = np.maximum.accumulate(alone + self.e * KNOTS)
        self._slopes[max_tokens] = _Slopes(sizes, least, taken, (sizes.tolist(), least.tolist(), taken.tolist()))
        return self._slopes[max_tokens]


def _interpolate(x: float, xs: list[float], ys: list[float]) -> float:
    """Return `numpy.interp` of one number, which is faster on lists."""
    if x < xs[0]:
        return ys[0]
    if x >= xs[-1]:
        return ys[-1]
    at = bisect_right(xs, x) - 1
    return ys[at] + (ys[at + 1] - ys[at]) / (xs[at + 1] - xs[at]) * (x - xs[at])


def _within(limit_s: float, costs: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """Return the (tokens, seconds) up to ``limit_s`` seconds: corners of ``costs``, and where the line crosses it.

    The largest come first.
    """
    found: list[tuple[float, float]] = []
    above: tuple[float, float] | None = None
    for tokens, seconds in reversed(costs):
        if seconds > limit_s:
            above = (tokens, seconds)
            continue
        if above is not None:
            found.append((tokens + (above[0] - tokens) * (limit_s - seconds) / (above[1] - seconds), limit_s))
            above = None
        found.append((tokens, seconds))
    return found


def _price(seconds: float, costs: list[tuple[float, float]]) -> float:
    """Return the slope (tokens/s) at ``seconds`` of the concave hull of ``costs`` and the origin; 0 past its end."""
    tokens = spent = 0.0
    while segments := [((p - tokens) / (cost - spent), p, cost) for p, cost in costs if cost > spent]:
        slope, tokens, spent = max(segments)
        if spent >= seconds:
            return slope
    return 0.0


def refitted(previous: StepCurve, decodes: Floats, context: Floats, prefill: Floats, seconds: Floats) -> StepCurve:
    """Return ``previous`` corrected by steps that took ``seconds``. All arrays have shape (samples,)."""
    guess = np.concatenate([previous.at_knots, [previous.a, previous.e, previous.h]])
    terms = _Terms.of(decodes, context, prefill)
    drift = min(max(previous.drift, 1 / MAX_DRIFT), MAX_DRIFT)
    speed = _speed(terms.predict(guess), seconds) * (drift / previous.drift)
    # Without prefill samples, e and h stay as they are. Otherwise they would drift with the noise of decode steps.
    guess[: len(KNOTS) + 1 if not prefill.any() else None] *= speed
    # Weight by relative error, so that short steps count as much as long ones. The weight of an outlier that took
    # much longer than predicted is bounded.
    weight = 1 / np.maximum(np.maximum(terms.predict(guess), seconds), 1e-9) ** 2
    first = terms.solve(guess, seconds, weight)
    error = np.abs(seconds / np.maximum(terms.predict(first), 1e-9) - 1)
    # Solve again with smaller weights for outliers (Huber).
    usual = max(3 * median(error), 0.02)
    fit = terms.solve(guess, seconds, weight * np.minimum(1.0, usual / np.maximum(error, 1e-9)))
    a, e, h = fit[len(KNOTS) :].tolist()
    values = _non_decreasing(fit[: len(KNOTS)], terms.weights_at_knots(weight))
    fit[: len(KNOTS)] = _continued(values, e, float((decodes + prefill).max()))
    a, h = max(a, 0.0), max(h, 0.0)
    fit[len(KNOTS) :] = a, e, h
    # The next refit scales by what this one left between the fit and the median.
    return StepCurve(fit[: len(KNOTS)], a, e, h, drift * _speed(terms.predict(fit), seconds))


def _non_decreasing(values: Floats, weights: Floats) -> Floats:
    """Return the non-decreasing values of at least 0 with the least squared difference from ``values``, by ``weights``.

    A knot without samples moves more than one with many. By the pool-adjacent-violators algorithm.
    """
    pools: list[tuple[float, float, int]] = []
    for one in zip(values.tolist(), weights.tolist(), [1] * len(values), strict=True):
        pool = one
        while pools and pools[-1][0] > pool[0]:
            (value, weight, knots), (before, more, others) = pool, pools.pop()
            pool = (value * weight + before * more) / (weight + more), weight + more, knots + others
        pools.append(pool)
    return np.repeat([max(value, 0.0) for value, _, _ in pools], [knots for _, _, knots in pools])


def _continued(values: Floats, e: float, largest: float) -> Floats:
    """Return f at `KNOTS` such that prompt tokens beyond ``largest``, the tokens of the largest step, cost at least 0.

    On CPU a decode costs several times a prompt token. So e is far below 0, and f may continue less steeply than that.
    Where f + e*n falls, it rises instead, as steeply as from 0 to ``largest`` on average.
    """
    seen = max(int(np.searchsorted(KNOTS, largest, side="right")) - 1, 1)
    chunk_s = values + e * KNOTS
    added = np.diff(chunk_s)[seen:]
    if (added >= 0).all():
        return values
    largest = max(largest, KNOTS[seen])
    at_largest = float(np.interp(largest, KNOTS, chunk_s))
    rising = max(at_largest, 0.0) / largest * np.diff(np.append(largest, KNOTS[seen + 1 :]))
    # The first of these segments has samples up to ``largest``. The more of it they fill, the less it may change.
    unseen = (KNOTS[seen + 1] - largest) / (KNOTS[seen + 1] - KNOTS[seen])
    rising[0] = at_largest - chunk_s[seen] + unseen * rising[0]
    added = np.where(added < 0, rising, added)
    return np.append(values[: seen + 1], chunk_s[seen] + np.cumsum(added) - e * KNOTS[seen + 1 :])


def _speed(predicted: Floats, seconds: Floats) -> float:
    """Return the median ratio of ``seconds`` to the ``predicted`` ones."""
    return median(seconds / np.maximum(predicted, 1e-9))


@dataclass(slots=True, frozen=True)
class _Terms:
    """The factors that multiply the coefficients (f at `KNOTS`, a, e, h) in T(D, C, p) of each step.

    Each step has at most five non-zero factors: for two knots, and C, p and [p > 0]. ``indices`` are their
    coefficients' numbers and ``factors`` their values, both of shape (samples, 5). ``pairs``: where the products of two
    factors of a step belong in the flat Gram matrix, shape (25 * samples,).

    NOTE: sums over steps use no matrix product. It would start BLAS threads, which take cores from the engine.
    """

    indices: NDArray[np.intp]
    factors: Floats
    pairs: NDArray[np.intp]

    @classmethod
    def of(cls, decodes: Floats, context: Floats, prefill: Floats) -> _Terms:
        tokens, knots = decodes + prefill, len(KNOTS)
        right = np.clip(np.searchsorted(KNOTS, tokens), 1, knots - 1)
        share = (tokens - KNOTS[right - 1]) / (KNOTS[right] - KNOTS[right - 1])
        others = (np.full_like(right, knots + more) for more in range(3))
        indices = np.stack([right - 1, right, *others], axis=1)
        factors = np.stack([1 - share, share, context, prefill, prefill > 0], axis=1)
        return cls(indices, factors, (indices[:, :, None] * (knots + 3) + indices[:, None, :]).ravel())

    def weights_at_knots(self, weight: Floats) -> Floats:
        """Return how much the steps, with ``weight`` (samples,), say about f at each knot; more than 0."""
        sums = np.bincount(self.indices[:, :2].ravel(), (self.factors[:, :2] * weight[:, None]).ravel(), len(KNOTS))
        return np.asarray(sums + _KNOT_MEMORY * float(weight.mean()), dtype=np.float64)

    def predict(self, coefficients: Floats) -> Floats:
        """Return T of each step, shape (samples,)."""
        return np.asarray((coefficients[self.indices] * self.factors).sum(axis=1))

    def solve(self, guess: Floats, seconds: Floats, weight: Floats) -> Floats:
        """Return the coefficients near ``guess`` with the least squared error; ``weight`` has shape (samples,)."""
        size, knots, mean_weight = len(guess), len(KNOTS), float(weight.mean())
        weighted = self.factors * weight[:, None]
        products = weighted[:, :, None] * self.factors[:, None, :]
        gram = np.bincount(self.pairs, products.ravel(), size * size).astype(np.float64).reshape(size, size)
        residual = weighted * (seconds - self.predict(guess))[:, None]
        moment = np.bincount(self.indices.ravel(), residual.ravel(), size)
        prior = _PRIOR_STEPS / len(seconds) * gram.diagonal()[knots:]
        gram[:knots, :knots] += mean_weight * _KNOT_PRIOR
        np.fill_diagonal(gram[knots:, knots:], gram.diagonal()[knots:] + np.maximum(prior, 1e-12))
        return np.asarray(guess + np.linalg.solve(gram, moment), dtype=np.float64)


def _bending() -> Floats:
    """Return the matrix B with v'Bv = sum over inner knots of (v - linear interpolation of its neighbours)^2."""
    rows = np.zeros((len(KNOTS) - 2, len(KNOTS)))
    for at in range(1, len(KNOTS) - 1):
        share = (KNOTS[at] - KNOTS[at - 1]) / (KNOTS[at + 1] - KNOTS[at - 1])
        rows[at - 1, at - 1 : at + 2] = -(1 - share), 1.0, -share
    return np.asarray(rows.T @ rows, dtype=np.float64)


_KNOT_PRIOR = _STIFFNESS * _bending() + _KNOT_MEMORY * np.eye(len(KNOTS))
