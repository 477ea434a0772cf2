"""Counters and histograms that each request updates, for the registry of `prometheus_client`.

Its own ones take a lock, check labels and search the buckets one by one in each update, which was 4% of a request's
cost. These are updated on the event loop only, so an update is a dictionary lookup and an addition. `/metrics` shows
the same lines.
"""

from __future__ import annotations

import time
from bisect import bisect_left
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial

from prometheus_client import CollectorRegistry
from prometheus_client.core import CounterMetricFamily, HistogramMetricFamily
from prometheus_client.registry import Collector
from prometheus_client.samples import Exemplar
from prometheus_client.utils import floatToGoString

Labels = tuple[str, ...]
"""The values of a metric's labels, in the order of their names."""


class Counters(Collector):
    """A counter for each combination of label values. ``name`` ends in ``_total``."""

    def __init__(self, name: str, text: str, labels: Sequence[str], registry: CollectorRegistry) -> None:
        self._name, self._text, self._labels = name, text, labels
        self._values: dict[Labels, float] = {}
        self._created: dict[Labels, float] = {}
        registry.register(self)

    def add(self, labels: Labels, amount: float = 1) -> None:
        """Add ``amount``, which must not be negative."""
        values = self._values
        if labels in values:
            values[labels] += amount
        else:
            self._created[labels] = time.time()
            values[labels] = float(amount)

    def collect(self) -> Iterator[CounterMetricFamily]:
        """Yield the metric with all its samples."""
        family = CounterMetricFamily(self._name, self._text, labels=self._labels)
        for labels, value in list(self._values.items()):
            family.add_metric(labels, value, created=self._created[labels])
        yield family


class _Series:
    """The observations with the same label values: their number by bucket, their sum, an exemplar by bucket."""

    __slots__ = ("counts", "created", "exemplars", "total")

    def __init__(self, buckets: int) -> None:
        self.counts = [0] * buckets
        self.total = 0.0
        self.exemplars: dict[int, Exemplar] = {}
        self.created = time.time()


class Histograms(Collector):
    """A histogram for each combination of label values. ``bounds``: the upper bounds of all buckets but the last."""

    def __init__(
        self, name: str, text: str, labels: Sequence[str], bounds: Sequence[float], registry: CollectorRegistry
    ) -> None:
        self._name, self._text, self._labels = name, text, labels
        self._bounds = [float(bound) for bound in bounds]
        self._series: dict[Labels, _Series] = {}
        if not labels:
            # A metric without labels shows from the start.
            self._series[()] = _Series(len(bounds) + 1)
        registry.register(self)

    def observer(self, labels: Labels) -> Callable[[float], None]:
        """Return `observe` for ``labels``, which show from now on."""
        self._series.setdefault(labels, _Series(len(self._bounds) + 1))
        return partial(self.observe, labels)

    def observe(self, labels: Labels, value: float, exemplar: Mapping[str, str] | None = None) -> None:
        """Count ``value``. ``exemplar``: labels of an example to show for its bucket."""
        series = self._series.get(labels)
        if series is None:
            series = self._series[labels] = _Series(len(self._bounds) + 1)
        bucket = bisect_left(self._bounds, value)
        series.counts[bucket] += 1
        series.total += value
        if exemplar is not None:
            series.exemplars[bucket] = Exemplar(dict(exemplar), value, time.time())

    def collect(self) -> Iterator[HistogramMetricFamily]:
        """Yield the metric with all its samples."""
        family = HistogramMetricFamily(self._name, self._text, labels=self._labels)
        names = [floatToGoString(bound) for bound in (*self._bounds, float("inf"))]  # type: ignore[no-untyped-call]
        for labels, series in list(self._series.items()):
            buckets: list[tuple[str, float] | tuple[str, float, Exemplar]] = []
            count = 0.0
            for bucket, name in enumerate(names):
                count += series.counts[bucket]
                exemplar = series.exemplars.get(bucket)
                buckets.append((name, count) if exemplar is None else (name, count, exemplar))
            family.add_metric(labels, buckets, series.total)
            family.add_sample(f"{self._name}_created", dict(zip(self._labels, labels, strict=True)), series.created)
        yield family
