"""gateway.observability.series: the same exposition as prometheus_client's own metrics."""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest
from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.openmetrics import exposition as openmetrics

from gateway.observability.series import Counters, Histograms

BOUNDS = (0.01, 0.5, 2)


def filled() -> tuple[CollectorRegistry, CollectorRegistry]:
    """Return a registry of prometheus_client's metrics, and one of ours, with the same numbers."""
    theirs, ours = CollectorRegistry(), CollectorRegistry()
    counter = Counter("x_total", "Some.", ("a", "b"), registry=theirs)
    counters = Counters("x_total", "Some.", ("a", "b"), ours)
    for labels, amount in ((("1", "2"), 1), (("1", "é"), 0), (("1", "2"), 2.5)):
        counter.labels(*labels).inc(amount)
        counters.add(labels, amount)
    histogram = Histogram("y_seconds", "Times.", ("a",), buckets=BOUNDS, registry=theirs)
    histograms = Histograms("y_seconds", "Times.", ("a",), BOUNDS, ours)
    for value in (0.0, 0.01, 0.011, 0.5, 3.0):
        exemplar = {"request_id": str(value)} if value != 0.0 else None
        histogram.labels("q").observe(value, exemplar)
        histograms.observe(("q",), value, exemplar)
    histogram.labels("empty")
    histograms.observer(("empty",))
    Histogram("z_tokens", "Tokens.", buckets=BOUNDS, registry=theirs)
    Histograms("z_tokens", "Tokens.", (), BOUNDS, ours)
    return theirs, ours


def without_times(text: bytes) -> list[str]:
    """Return the lines, without times of creation and of exemplars."""
    lines = [re.sub(r"(# \{.*\} \S+) \S+$", r"\1", line) for line in text.decode().splitlines()]
    return [re.sub(r"(_created\S*) \S+$", r"\1", line) for line in lines]


@pytest.mark.parametrize("expose", [generate_latest, openmetrics.generate_latest])
def test_exposition_equals_that_of_prometheus_client(expose: Callable[[CollectorRegistry], bytes]) -> None:
    theirs, ours = filled()
    assert without_times(expose(ours)) == without_times(expose(theirs))


def test_observer_counts_for_its_labels() -> None:
    registry = CollectorRegistry()
    observe = Histograms("y_seconds", "Times.", ("a",), BOUNDS, registry).observer(("q",))
    observe(0.25)
    assert registry.get_sample_value("y_seconds_bucket", {"a": "q", "le": "0.5"}) == 1
    assert registry.get_sample_value("y_seconds_sum", {"a": "q"}) == 0.25
