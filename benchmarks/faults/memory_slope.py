"""The slope of a process's memory, robust against single steps and noise."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations
from statistics import median

WINDOW_S = 10.0
"""Length of a window (s). Its median hides short peaks, such as the bodies of mutated requests."""

Point = tuple[float, float]
"""Seconds, and MB."""


def levels(samples: Sequence[Point]) -> list[Point]:
    """Return the median of each window of `WINDOW_S`, at the middle of the window."""
    windows: dict[int, list[float]] = {}
    for at, mb in samples:
        windows.setdefault(int(at // WINDOW_S), []).append(mb)
    return [((number + 0.5) * WINDOW_S, median(found)) for number, found in sorted(windows.items())]


def slope(samples: Sequence[Point]) -> float:
    """Return the slope (MB a minute) by Theil and Sen: the median of the slopes between all pairs of windows.

    A leak grows in every window. One step, such as a new peak of open requests, changes least squares but not this.
    0 if there are fewer than two windows.
    """
    pairs = combinations(levels(samples), 2)
    slopes = [60 * (mb - before) / (at - since) for (since, before), (at, mb) in pairs]
    return median(slopes) if slopes else 0.0
