"""Arrival times: a renewal process, or the times of a recorded trace."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]


def renewal(
    random: np.random.Generator, qps: float, cv: float, requests: int | None, duration_s: float | None
) -> Floats:
    """Return arrival times (s) with independent gaps of mean ``1 / qps`` and coefficient of variation ``cv``.

    Gaps are Gamma distributed with shape 1 / cv^2; cv 1 is a Poisson process, above 1 it is bursty. The gaps of one
    seed at two rates differ only by a factor. Arrivals end after ``requests`` or before ``duration_s``, whichever comes
    first. One of them is required.
    """
    if duration_s is None:
        assert requests is not None
        return np.cumsum(unit_gaps(random, cv, requests)) / qps
    expected = qps * duration_s
    chunk = int(expected + 6 * cv * np.sqrt(expected)) + 64
    if requests is not None:
        chunk = min(chunk, requests)
    gaps = unit_gaps(random, cv, chunk)
    while gaps.sum() < expected and (requests is None or len(gaps) < requests):
        gaps = np.concatenate([gaps, unit_gaps(random, cv, chunk)])
    times = np.cumsum(gaps)[:requests] / qps
    return times[times < duration_s]


def unit_gaps(random: np.random.Generator, cv: float, n: int) -> Floats:
    """Return ``n`` gaps with mean 1 and coefficient of variation ``cv``."""
    if cv == 1:
        return random.standard_exponential(n)
    return random.standard_gamma(1 / cv**2, n) * cv**2


def replay(
    at_s: Floats,
    *,
    qps: float | None,
    speed: float,
    window_s: float | None,
    requests: int | None,
    duration_s: float | None,
) -> Floats:
    """Return the arrival times (s) of a trace: its first ``window_s`` seconds, ``speed`` times as fast.

    If ``qps`` is given, the speed is set so that the mean rate over the window is ``qps``. Arrivals end after
    ``requests`` or before ``duration_s`` (measured after the change of speed).
    """
    times = at_s if window_s is None else at_s[at_s < window_s]
    if qps is not None:
        span = window_s if window_s is not None and window_s < at_s[-1] else float(times[-1])
        speed = qps * span / len(times)
    times = times[:requests] / speed
    return times if duration_s is None else times[times < duration_s]
