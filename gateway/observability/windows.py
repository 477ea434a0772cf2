"""SLO adherence, goodput, rejections and predictions over sliding windows of the requests that ended.

A request costs two dictionary lookups and a few additions, whatever the length of the windows (`SlidingSums`).
Adherence is attained / (ended - cancelled): rejected and failed requests stay in the denominator. Requests whose client
left are not in it, because nothing says whether they would have attained their SLO.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Hashable, Iterable, Iterator
from itertools import groupby
from operator import itemgetter
from typing import Any, Generic, TypeVar

from gateway.observability.ledger import Entry
from gateway.requests.request import Request

TICK_S = 5
"""Resolution of the windows in seconds: a window is at most this much shorter than its name says."""

WINDOWS = ("1m", "5m", "1h")
"""Names of the windows. The last one is in minutes, so it holds up to one minute more."""

MAX_SERIES = 512
"""Combinations of class, tenant and model that are told apart. Further ones are counted per class, as `OTHER`."""

MAX_TENANTS = 20
"""Maximum number of tenants in a document. The tenants with the fewest requests are in `OTHER`."""

OTHER = "(other)"

_TICKS_PER_MINUTE = 60 // TICK_S

# Columns of the sums of one class, tenant and model. Times in microseconds: sums of integers have no rounding error.
_COLUMNS = (
    _ARRIVED, _ATTAINED, _FINISHED, _REJECTED, _FAILED, _CANCELLED, _OUTPUT_TOKENS,
    _PREDICTED, _PREDICTED_TTFT_US, _PREDICTED_ACHIEVED_US, _TTFT_ERROR_US,
    _PACED, _PACE_US, _PACED_TPOT_US,
) = range(14)  # fmt: skip
_OUTCOME = {"finished": _FINISHED, "rejected": _REJECTED, "failed": _FAILED, "cancelled": _CANCELLED}

_GAUGES = {
    "antares_adherence_ratio": "adherence",
    "antares_goodput_requests_per_second": "goodput_per_s",
    "antares_arrival_requests_per_second": "arrived_per_s",
    "antares_output_tokens_per_second": "output_tokens_per_s",
}
"""Metric names and what they export."""

K = TypeVar("K", bound=Hashable)
Sums = list[int]


class SlidingSums(Generic[K]):
    """Sums of integers per key over the last minute, 5 minutes and hour.

    `cell` returns the sums of the current tick, for the caller to add to. A tick that ends is added to the totals of
    each window, and subtracted again when it leaves the window.

    Args:
        columns: integers per key.
        now: monotonic seconds.
    """

    def __init__(self, columns: int, now: float) -> None:
        self._zeros = [0] * columns
        self._tick_ends = now + TICK_S
        self._tick: dict[K, Sums] = {}
        self._minute: dict[K, Sums] = {}
        self._ticks_in_minute = 0
        # The current tick or minute belongs to each window too.
        self._rings = {"1m": _Ring(60 // TICK_S - 1), "5m": _Ring(300 // TICK_S - 1), "1h": _Ring(60 - 1)}
        self._known: set[K] = set()

    def cell(self, key: K, otherwise: K, now: float) -> Sums:
        """Return the sums of ``key`` in the current tick; of ``otherwise`` if the key is new and there are too many."""
        if now >= self._tick_ends:
            self._advance(now)
        cell = self._tick.get(key)
        if cell is None:
            if key not in self._known:
                if len(self._known) >= MAX_SERIES:
                    return self._tick.setdefault(otherwise, self._zeros.copy())
                self._known.add(key)
            cell = self._tick[key] = self._zeros.copy()
        return cell

    def totals(self, window: str, now: float) -> dict[K, Sums]:
        """Return the sums over ``window`` by key."""
        if now >= self._tick_ends:
            self._advance(now)
        totals = {key: sums.copy() for key, sums in self._rings[window].totals.items()}
        if window == "1h":
            _add(totals, self._minute)
        _add(totals, self._tick)
        return totals

    def seconds(self, window: str, now: float) -> float:
        """Return the time that the totals of ``window`` cover, at least one second."""
        if now >= self._tick_ends:
            self._advance(now)
        ticks = len(self._rings[window].buckets)
        if window == "1h":
            ticks = ticks * _TICKS_PER_MINUTE + self._ticks_in_minute
        return max(1.0, (ticks + 1) * TICK_S - (self._tick_ends - now))

    def _advance(self, now: float) -> None:
        """End the current tick, and as many empty ones as have passed without a request."""
        ended = int((now - self._tick_ends) // TICK_S) + 1
        self._tick_ends += ended * TICK_S
        # More empty ticks than the longest window has change nothing.
        for _ in range(min(ended, 61 * _TICKS_PER_MINUTE)):
            tick, self._tick = self._tick, {}
            self._rings["1m"].push(tick)
            self._rings["5m"].push(tick)
            _add(self._minute, tick)
            self._ticks_in_minute += 1
            if self._ticks_in_minute == _TICKS_PER_MINUTE:
                self._rings["1h"].push(self._minute)
                self._minute, self._ticks_in_minute = {}, 0
                self._known = set(self._rings["1h"].totals)


class _Ring:
    """The last ``size`` buckets and their totals. Buckets do not change after `push`."""

    def __init__(self, size: int) -> None:
        self.buckets: deque[dict[Any, Sums]] = deque()
        self.totals: dict[Any, Sums] = {}
        self._size = size

    def push(self, bucket: dict[Any, Sums]) -> None:
        self.buckets.append(bucket)
        _add(self.totals, bucket)
        if len(self.buckets) > self._size:
            for key, sums in self.buckets.popleft().items():
                left = [total - value for total, value in zip(self.totals[key], sums, strict=True)]
                if any(left):
                    self.totals[key] = left
                else:
                    del self.totals[key]


def _add(totals: dict[K, Sums], more: dict[K, Sums]) -> None:
    for key, sums in more.items():
        total = totals.get(key)
        totals[key] = sums.copy() if total is None else [a + b for a, b in zip(total, sums, strict=True)]


class Windows:
    """What happened to requests in the last minute, 5 minutes and hour, per SLO class, tenant and model."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        now = clock()
        self._sums: SlidingSums[tuple[str, str, str]] = SlidingSums(len(_COLUMNS), now)
        self._reasons: SlidingSums[tuple[str, str, str]] = SlidingSums(1, now)

    def on_open(self, request: Request) -> None:
        """Count an accepted request (`Ledger.on_open`)."""
        self._cell(request, self._clock())[_ARRIVED] += 1

    def on_close(self, entry: Entry) -> None:
        """Count a request that ended (`Ledger.on_close`)."""
        request, now, outcome = entry.request, self._clock(), entry.outcome or "failed"
        cell = self._cell(request, now)
        cell[_OUTCOME[outcome]] += 1
        cell[_OUTPUT_TOKENS] += request.generated
        if outcome != "finished":
            self._count_reason(request.slo_class, outcome, entry.reason, now)
            return
        if entry.violated:
            self._count_reason(request.slo_class, "missed", "+".join(entry.violated), now)
        else:
            cell[_ATTAINED] += 1
        if entry.predicted_ttft_s is not None and entry.ttft_s is not None:
            predicted_us, achieved_us = int(1e6 * entry.predicted_ttft_s), int(1e6 * entry.ttft_s)
            cell[_PREDICTED] += 1
            cell[_PREDICTED_TTFT_US] += predicted_us
            cell[_PREDICTED_ACHIEVED_US] += achieved_us
            cell[_TTFT_ERROR_US] += abs(predicted_us - achieved_us)
        if request.pace_s is not None and request.generated > request.sequences:
            cell[_PACED] += 1
            cell[_PACE_US] += int(1e6 * request.pace_s)
            cell[_PACED_TPOT_US] += int(1e6 * entry.tpot_s)

    def _cell(self, request: Request, now: float) -> Sums:
        key = (request.slo_class, request.tenant, request.model)
        return self._sums.cell(key, (request.slo_class, OTHER, OTHER), now)

    def _count_reason(self, slo_class: str, outcome: str, reason: str, now: float) -> None:
        self._reasons.cell((slo_class, outcome, reason), (slo_class, outcome, OTHER), now)[0] += 1

    def document(self, window: str) -> dict[str, Any]:
        """Return the rates and ratios of ``window``: in total, by class, by tenant and by model, and the reasons.

        ``reasons`` lists how many requests did not attain their SLO, and why. A request that finished and missed bounds
        has the outcome ``missed`` and their names as its reason.
        """
        now = self._clock()
        seconds, sums = self._sums.seconds(window, now), self._sums.totals(window, now)

        def rates_by(part: int, limit: int | None = None) -> dict[str, Any]:
            return {name: _rates(total, seconds) for name, total in _grouped(sums, part, limit).items()}

        reasons = sorted(self._reasons.totals(window, now).items(), key=lambda item: -item[1][0])
        return {
            "seconds": round(seconds, 1),
            "total": _rates(_summed(sums.values()), seconds),
            "classes": rates_by(0),
            "tenants": rates_by(1, MAX_TENANTS),
            "models": rates_by(2),
            "reasons": [
                {"slo_class": slo_class, "outcome": outcome, "reason": reason, "count": count}
                for (slo_class, outcome, reason), (count,) in reasons
            ],
        }

    def classes(self, window: str) -> dict[str, dict[str, Any]]:
        """Return the rates and ratios of ``window`` by SLO class."""
        now = self._clock()
        seconds, sums = self._sums.seconds(window, now), self._sums.totals(window, now)
        return {name: _rates(total, seconds) for name, total in _grouped(sums, 0).items()}

    def gauges(self) -> Iterator[tuple[str, float, tuple[str, str, str]]]:
        """Yield name, value and labels (class, tenant, window) of every gauge in `/metrics`."""
        now = self._clock()
        for window in WINDOWS:
            seconds, sums = self._sums.seconds(window, now), self._sums.totals(window, now)
            by_tenant = sorted(sums.items(), key=lambda item: item[0][:2])
            for (slo_class, tenant), group in groupby(by_tenant, key=lambda item: item[0][:2]):
                rates, labels = _rates(_summed(total for _, total in group), seconds), (slo_class, tenant, window)
                for name, rate in _GAUGES.items():
                    if rates[rate] is not None:
                        yield name, rates[rate], labels


def _grouped(sums: dict[tuple[str, str, str], Sums], part: int, limit: int | None = None) -> dict[str, Sums]:
    """Return the sums by one part of their keys, most requests first. At most ``limit`` keys; the rest is `OTHER`."""
    groups: dict[str, Sums] = {}
    for key, total in sums.items():
        _add(groups, {key[part]: total})
    ranked = sorted(groups.items(), key=lambda item: -item[1][_ARRIVED])
    if limit is not None and len(ranked) > limit:
        named = [(name, total) for name, total in ranked if name != OTHER][: limit - 1]
        left = set(groups) - set(map(itemgetter(0), named))
        return {**dict(named), OTHER: _summed(groups[name] for name in left)}
    return dict(ranked)


def _summed(sums: Iterable[Sums]) -> Sums:
    return [sum(column) for column in zip([0] * len(_COLUMNS), *sums, strict=True)]


def _rates(sums: Sums, seconds: float) -> dict[str, Any]:
    ended = sums[_FINISHED] + sums[_REJECTED] + sums[_FAILED] + sums[_CANCELLED]
    counted = ended - sums[_CANCELLED]
    return {
        "arrived_per_s": round(sums[_ARRIVED] / seconds, 3),
        "goodput_per_s": round(sums[_ATTAINED] / seconds, 3),
        "output_tokens_per_s": round(sums[_OUTPUT_TOKENS] / seconds, 1),
        "adherence": round(sums[_ATTAINED] / counted, 4) if counted else None,
        "ended": ended,
        "attained": sums[_ATTAINED],
        **{outcome: sums[column] for outcome, column in _OUTCOME.items()},
        "ttft_predicted_ms": _mean_ms(sums[_PREDICTED_TTFT_US], sums[_PREDICTED]),
        "ttft_achieved_ms": _mean_ms(sums[_PREDICTED_ACHIEVED_US], sums[_PREDICTED]),
        "ttft_error_ms": _mean_ms(sums[_TTFT_ERROR_US], sums[_PREDICTED]),
        "tpot_planned_ms": _mean_ms(sums[_PACE_US], sums[_PACED]),
        "tpot_achieved_ms": _mean_ms(sums[_PACED_TPOT_US], sums[_PACED]),
    }


def _mean_ms(sum_us: int, count: int) -> float | None:
    return round(sum_us / count / 1000, 2) if count else None
