"""Prometheus metrics of what tenants use, read at each scrape."""

from __future__ import annotations

from collections.abc import Iterable

from prometheus_client.core import CounterMetricFamily, Metric
from prometheus_client.registry import Collector

from gateway.tenants.usage import Usage


class UsageMetrics(Collector):
    """Exports ``usage``. The tenants are bounded there."""

    def __init__(self, usage: Usage) -> None:
        self._usage = usage

    def collect(self) -> Iterable[Metric]:
        """Return the counts by tenant."""
        requests = CounterMetricFamily(
            "antares_tenant_requests_total", "Requests of a tenant, scheduled or not, by outcome.",
            labels=("tenant", "outcome"),
        )  # fmt: skip
        limited = CounterMetricFamily(
            "antares_rate_limited_requests_total", "Requests beyond a limit of their tenant.",
            labels=("tenant", "limit"),
        )  # fmt: skip
        for tenant, usage in self._usage.tenants.items():
            for outcome, count in usage.requests.items():
                requests.add_metric((tenant, outcome), count)
            for limit, count in usage.limited.items():
                limited.add_metric((tenant, limit), count)
        return requests, limited
