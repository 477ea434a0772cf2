"""A predicted output length, and the recent lengths that predict it without the service."""

from __future__ import annotations

import math
from bisect import bisect_left, insort
from collections import defaultdict, deque
from typing import NamedTuple


class Prediction(NamedTuple):
    """Predicted output tokens of one sequence, their 0.9 quantile, and the source.

    ``source`` is ``service``, ``fallback``, or ``hint``: the length that the client stated. ``beyond``: the p50 and p90
    that apply if the output becomes longer than ``p90``; None if those of this prediction do.
    ``raw``: the service's p50 and p90 before its online correction. The report of the actual length returns them to it.
    """

    tokens: float
    p90: float
    source: str
    raw: tuple[float, float] | None = None
    beyond: tuple[float, float] | None = None


class LengthStatistics:
    """The last ``window`` output lengths per class. Predicts ``expected`` tokens for a class without any."""

    def __init__(self, expected: float = 128.0, window: int = 256) -> None:
        self.expected = expected
        self._window = window
        self._lengths: defaultdict[str, deque[int]] = defaultdict(deque)
        self._sorted: defaultdict[str, list[int]] = defaultdict(list)

    def observe(self, slo_class: str, tokens: int) -> None:
        """Record a finished request of the class with ``tokens`` output tokens per sequence."""
        lengths, ordered = self._lengths[slo_class], self._sorted[slo_class]
        lengths.append(tokens)
        insort(ordered, tokens)
        if len(lengths) > self._window:
            del ordered[bisect_left(ordered, lengths.popleft())]

    def predict(self, slo_class: str) -> Prediction:
        """Return the class's median and 0.9 quantile over the window."""
        lengths = self._sorted.get(slo_class)
        if not lengths:
            return Prediction(self.expected, 2 * self.expected, "fallback")
        return Prediction(
            lengths[len(lengths) // 2], lengths[min(len(lengths) - 1, int(0.9 * len(lengths)))], "fallback"
        )


def within(prediction: Prediction, max_tokens: int | None, min_tokens: int) -> Prediction:
    """Return ``prediction`` within the limits that the request states."""
    most, least = math.inf if max_tokens is None else max_tokens, max(1.0, min_tokens)
    if prediction.beyond is None and least <= prediction.tokens <= prediction.p90 <= most:
        return prediction
    return Prediction(
        tokens=max(least, min(prediction.tokens, most)),
        p90=max(least, min(prediction.p90, most)),
        source=prediction.source,
        raw=prediction.raw,
    )
