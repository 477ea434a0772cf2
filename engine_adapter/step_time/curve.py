"""The shape of step times: not a line, because hardware works in waves.

A step of D decodes with contexts that sum to C, beside p prompt tokens, takes

    T(D, C, p) = f(D + p) + a*C + e*p + h*[p > 0]

with f piecewise linear in the number of tokens. While a step is bound by memory, more tokens cost next to nothing, and
where a new wave of tiles begins they cost a leap. Whoever believes in one slope (SCORPIO's eq. 4 and 6) leaves tokens
that are all but free, and pays for few where many cost the same.

f is learnt from the steps that were seen by least squares with a penalty on every change of slope that the curve before
did not have: where there are no data it keeps its old shape, moved to the pace of today.
All times in seconds, sizes in tokens.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from engine_adapter.step_time.linear_forms import Floats, StepTimes

KNOTS: Floats = np.array(
    [0, 1, 4, 8, 16, 24, 32, 48, 64, 80, 96, 112, 128, 144, 160, 176, 192, 224, 256, 288, 320, 352, 384, 448, 512, 640,
     768, 1024, 1536, 2048, 4096, 8192, 65536], dtype=np.float64
)  # fmt: skip
"""Tokens in a step between which f is a line: closer where steps are small and leaps matter."""

WORTH = 0.8
"""A second of slack is spent if it computes at least so many tokens, as a share of what it would compute later."""

SPENT = 0.8
"""Of the time that is there for a chunk, what it takes by what is known: it may turn out 1/`SPENT` as dear."""

_LEAST_CHUNK = 128
"""Tokens: what smaller chunks cost is too little beside a step to be learnt well."""

_CHEAPEST = 0.25
"""Beside decodes a prompt token costs at least so much of what it costs in a step full of prompts."""

_TYPICAL = 16
"""Sequences."""

_STIFFNESS = 1.0
"""What a change of slope weighs, in steps: this many that say otherwise are believed half."""

_MEMORY = 3e-4
"""What the curve before weighs at each knot, in steps: where there are no data its bends count, not its heights."""

_PRIOR_STEPS = 3.0
"""What the other coefficients of before weigh, in steps (as in `step_time.fit_itl`)."""


@dataclass(slots=True, frozen=True)
class _Slopes:
    """What a prompt token costs in steps of up to so many tokens.

    ``sizes``: tokens in a step, shape (k,); ``slopes``: mu beside the decodes of `KNOTS` in steps of so many or more,
    shape (knots, k); ``taken``: f + e*n at `KNOTS`, never falling. ``lists``: the three again, as plain floats.
    """

    sizes: Floats
    slopes: Floats
    taken: Floats
    lists: tuple[list[float], list[list[float]], list[float]]


@dataclass(slots=True, frozen=True)
class StepCurve:
    """f at `KNOTS` (s, shape (knots,)), and the coefficients a, e and h of T(D, C, p)."""

    at_knots: Floats
    a: float
    e: float
    h: float
    _knots: list[float] = field(init=False, repr=False, compare=False)
    _values: list[float] = field(init=False, repr=False, compare=False)
    _slopes: dict[int, _Slopes] = field(init=False, repr=False, compare=False, default_factory=dict)

    def __post_init__(self) -> None:
        # Plain floats: the gate looks single values up, for which an array is slow.
        object.__setattr__(self, "_knots", KNOTS.tolist())
        object.__setattr__(self, "_values", self.at_knots.tolist())

    @classmethod
    def of(cls, times: StepTimes) -> StepCurve:
        """What SCORPIO's two forms say: one slope for decodes, one for prompt tokens on top of them.

        A prompt alone takes t(p), as eq. 6 has it, which the fixed cost d of every step is part of. Without theta and
        delta, and with c*L, which is not a cost of any token, as it is in a batch of `_TYPICAL`.
        """
        fixed = max(times.beta - times.d, 0.0)
        return cls(times.d + times.b * KNOTS, times.a + times.c / _TYPICAL, times.alpha - times.b, fixed)

    def step_s(self, decodes: float, context: float, prefill: float = 0.0) -> float:
        """T(D, C, p); 0 for a step without tokens."""
        tokens = decodes + prefill
        if tokens <= 0:
            return 0.0
        seconds = self._f(tokens) + self.a * context
        return seconds + self.e * prefill + self.h if prefill else seconds

    def steps_s(self, decodes: Floats, context: Floats, prefill: Floats | None = None) -> Floats:
        """T(D, C, p) over arrays."""
        if prefill is None:
            return np.interp(decodes, KNOTS, self.at_knots) + self.a * context
        seconds = np.interp(decodes + prefill, KNOTS, self.at_knots) + self.a * context
        return np.asarray(seconds + self.e * prefill + self.h * np.greater(prefill, 0), dtype=np.float64)

    def prefill_token_s(self, decodes: float, most: int, spare_s: float = 0.0) -> float:
        """mu(D): seconds that a prompt token adds in chunks that take ``spare_s`` or more; steps hold ``most`` tokens.

        The least slope from T(D, C, 0) to T(D, C, p) over such p: what prefill costs in the long run, as steps may take
        turns. Smaller chunks may cost less a token, but a spare second is not filled with them: each is a step of its
        own.
        """
        knots, known = self._knots, self._least_slopes(most)
        sizes, slopes, taken = known.lists
        filled = _interpolated(_interpolated(decodes, knots, taken) + (spare_s - self.h), taken, knots)
        at = bisect_left(sizes, min(filled, most))
        right = min(max(bisect_left(knots, decodes), 1), len(knots) - 1)
        left = right - 1
        share = (decodes - knots[left]) / (knots[right] - knots[left])
        below = slopes[left][at]
        return below + share * (slopes[right][at] - below)

    def prefill_tokens_s(self, decodes: Floats, most: int, spare_s: Floats | float = 0.0) -> Floats:
        """`prefill_token_s` over arrays."""
        known = self._least_slopes(most)
        sizes, slopes, taken = known.sizes, known.slopes, known.taken
        filled = np.interp(np.interp(decodes, KNOTS, taken) + (spare_s - self.h), taken, KNOTS)
        at = np.searchsorted(sizes, np.minimum(filled, most))
        right = np.minimum(np.maximum(np.searchsorted(KNOTS, decodes), 1), len(KNOTS) - 1)
        left = right - 1
        share = (decodes - KNOTS[left]) / (KNOTS[right] - KNOTS[left])
        below = slopes[left, at]
        return np.asarray(below + share * (slopes[right, at] - below), dtype=np.float64)

    def chunk(self, decodes: float, context: float, within_s: float, pace_s: float, backlog: int) -> int:
        """Prompt tokens, up to ``backlog``, for a step that is to end within ``within_s``.

        Slack that is not spent now can be spent later, but no more of it than steps of ``pace_s`` leave. So a second of
        it has a price: the slope at pace_s - T(D, C, 0) of the concave hull of tokens over the seconds that they add
        (steps may take turns). The chunk is the one that is worth most of those that fit,

            max of p - WORTH * price * (T(D, C, p) - T(D, C, 0))   with   T(D, C, p) - T(D, C, 0) <= SPENT * spare,

        and 0 where none is worth anything. Where slack is plenty, prefill gets all that there is up to the pace: time
        that nobody uses is no good later, and what is believed to be dear is found to be cheap only where it is tried.
        """
        alone = self.step_s(decodes, context)
        spare = SPENT * (within_s - alone)
        if spare <= 0:
            return 0
        costs = self._costs(decodes, backlog)
        price = WORTH * _price(pace_s - alone, costs)
        return int(max([(0.0, 0.0), *((p - price * cost, p) for p, cost in _within(spare, costs))])[1])

    def _f(self, tokens: float) -> float:
        knots, values = self._knots, self._values
        at = min(max(bisect_left(knots, tokens), 1), len(knots) - 1)
        left, right = knots[at - 1], knots[at]
        return values[at - 1] + (values[at] - values[at - 1]) * (tokens - left) / (right - left)

    def _costs(self, decodes: float, most: int) -> list[tuple[float, float]]:
        """Chunks at which the slope changes, and the one of ``most``, with the seconds that each adds to a step.

        More never adds less: noise in what was learnt may say so.
        """
        alone = self._f(decodes) if decodes > 0 else 0.0
        e, base = self.e, self.h - alone
        corners: list[tuple[float, float]] = []
        least = 1e-9
        for knot, value in zip(self._knots, self._values, strict=True):
            if decodes < knot < decodes + most:
                least = max(least, value + e * (knot - decodes) + base)
                corners.append((knot - decodes, least))
        if most > 0:
            corners.append((most, max(least, self._f(decodes + most) + e * most + base)))
        return corners

    def _least_slopes(self, most: int) -> _Slopes:
        """Of chunks large enough that noise in what was learnt is small against what they cost.

        And never below a `_CHEAPEST` share of what prompts cost alone. Reckoned once for each ``most``.
        """
        if most in self._slopes:
            return self._slopes[most]
        sizes = np.append(KNOTS[most > KNOTS], most)
        f = np.interp(sizes, KNOTS, self.at_knots)
        alone = np.where(KNOTS > 0, self.at_knots, 0.0)
        prefill = sizes[None, :] - KNOTS[:, None]
        with np.errstate(divide="ignore", invalid="ignore"):
            slope = (f[None, :] - alone[:, None] + self.h) / prefill + self.e
        slope[prefill < np.minimum(_LEAST_CHUNK, most - KNOTS)[:, None]] = np.inf
        slope[prefill <= 0] = np.inf
        least = np.minimum.accumulate(slope[:, ::-1], axis=1)[:, ::-1]
        # A batch that leaves no room in a step prefills at the pace of the fullest that does.
        room = int(np.isfinite(least[:, -1]).sum())
        least[room:] = least[room - 1]
        least = np.maximum(least, max(_CHEAPEST * self.step_s(0, 0, most) / most, 0.0))
        taken = np.maximum.accumulate(alone + self.e * KNOTS)
        self._slopes[most] = _Slopes(sizes, least, taken, (sizes.tolist(), least.tolist(), taken.tolist()))
        return self._slopes[most]


def _interpolated(x: float, xs: list[float], ys: list[float]) -> float:
    """`numpy.interp` of one number, for which an array is slow."""
    if x < xs[0]:
        return ys[0]
    if x >= xs[-1]:
        return ys[-1]
    at = bisect_right(xs, x) - 1
    return ys[at] + (ys[at + 1] - ys[at]) / (xs[at + 1] - xs[at]) * (x - xs[at])


def _within(limit: float, costs: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """Of (tokens, seconds) along a line through ``costs``, those at its corners and where it crosses ``limit``.

    The largest first; none above ``limit``.
    """
    found: list[tuple[float, float]] = []
    above: tuple[float, float] | None = None
    for tokens, seconds in reversed(costs):
        if seconds > limit:
            above = (tokens, seconds)
            continue
        if above is not None:
            found.append((tokens + (above[0] - tokens) * (limit - seconds) / (above[1] - seconds), limit))
            above = None
        found.append((tokens, seconds))
    return found


def _price(seconds: float, costs: list[tuple[float, float]]) -> float:
    """Tokens that the last of so many ``seconds`` buys: the slope there of the concave hull of ``costs`` and nothing.

    0 when all of them take less.
    """
    tokens = spent = 0.0
    while dearer := [((p - tokens) / (cost - spent), p, cost) for p, cost in costs if cost > spent]:
        slope, tokens, spent = max(dearer)
        if spent >= seconds:
            return slope
    return 0.0


def refitted(before: StepCurve, decodes: Floats, context: Floats, prefill: Floats, seconds: Floats) -> StepCurve:
    """``before``, corrected by steps that took ``seconds`` (all of shape (samples,))."""
    guess = np.concatenate([before.at_knots, [before.a, before.e, before.h]])
    terms = _Terms.of(decodes, context, prefill)
    pace = float(np.median(seconds / np.maximum(terms.times(guess), 1e-9)))
    # What no step tells of stays as it is, or it would drift with the noise of the others.
    guess[: len(KNOTS) + 1 if not prefill.any() else None] *= pace
    # Relative errors: a short step tells as much as a long one, and a hiccup no more than that it was none.
    weight = 1 / np.maximum(np.maximum(terms.times(guess), seconds), 1e-9) ** 2
    found = terms.solved(guess, seconds, weight)
    off = np.abs(seconds / np.maximum(terms.times(found), 1e-9) - 1)
    # Once more, with what is far off by the standards of this sample counting for less (Huber's weights).
    usual = max(3 * float(np.median(off)), 0.02)
    found = terms.solved(guess, seconds, weight * np.minimum(1.0, usual / np.maximum(off, 1e-9)))
    a, e, h = found[len(KNOTS) :].tolist()
    return StepCurve(np.maximum.accumulate(np.maximum(found[: len(KNOTS)], 0.0)), max(a, 0.0), e, max(h, 0.0))


@dataclass(slots=True, frozen=True)
class _Terms:
    """T(D, C, p) of steps as what multiplies the coefficients (f at `KNOTS`, a, e, h).

    Each step has but five that are not 0: two knots, C, p and [p > 0]. ``which``: their numbers, ``by``: what they are
    multiplied by, both of shape (samples, 5). So sums over steps need no matrix product, which would wake the threads
    of a BLAS beside an engine that needs the cores.
    """

    which: NDArray[np.intp]
    by: Floats

    @classmethod
    def of(cls, decodes: Floats, context: Floats, prefill: Floats) -> _Terms:
        tokens, knots = decodes + prefill, len(KNOTS)
        right = np.clip(np.searchsorted(KNOTS, tokens), 1, knots - 1)
        share = (tokens - KNOTS[right - 1]) / (KNOTS[right] - KNOTS[right - 1])
        others = (np.full_like(right, knots + more) for more in range(3))
        return cls(
            np.stack([right - 1, right, *others], axis=1),
            np.stack([1 - share, share, context, prefill, prefill > 0], axis=1),
        )

    def times(self, coefficients: Floats) -> Floats:
        """T of each step, shape (samples,)."""
        return np.asarray((coefficients[self.which] * self.by).sum(axis=1))

    def solved(self, guess: Floats, seconds: Floats, weight: Floats) -> Floats:
        """The coefficients near ``guess`` that explain ``seconds`` best."""
        size, knots, typical = len(guess), len(KNOTS), float(weight.mean())
        weighted = self.by * weight[:, None]
        pairs = self.which[:, :, None] * size + self.which[:, None, :]
        products = weighted[:, :, None] * self.by[:, None, :]
        gram: Floats = np.bincount(pairs.ravel(), products.ravel(), size * size).astype(float).reshape(size, size)
        off = weighted * (seconds - self.times(guess))[:, None]
        moment = np.bincount(self.which.ravel(), off.ravel(), size)
        prior = _PRIOR_STEPS / len(seconds) * gram.diagonal()[knots:]
        gram[:knots, :knots] += typical * (_STIFFNESS * _BENDING + _MEMORY * np.eye(knots))
        np.fill_diagonal(gram[knots:, knots:], gram.diagonal()[knots:] + np.maximum(prior, 1e-12))
        return np.asarray(guess + np.linalg.solve(gram, moment), dtype=np.float64)


def _bending() -> Floats:
    """B with v'Bv the sum over inner knots of (how far v is from the line between its neighbours)^2."""
    rows = np.zeros((len(KNOTS) - 2, len(KNOTS)))
    for at in range(1, len(KNOTS) - 1):
        share = (KNOTS[at] - KNOTS[at - 1]) / (KNOTS[at + 1] - KNOTS[at - 1])
        rows[at - 1, at - 1 : at + 2] = -(1 - share), 1.0, -share
    return np.asarray(rows.T @ rows, dtype=np.float64)


_BENDING = _bending()
