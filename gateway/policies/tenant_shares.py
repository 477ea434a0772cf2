"""Weighted max-min fairness between the tenants of one engine, by the engine time that their running requests take.

A tenant's *usage* is the part of each step that its decodes take, plus the part of recent time that its prompts took.
Usage is measured on running requests, so a wrong length hint does not change it. A tenant's *share* is the total usage
of all tenants times its weight over the sum of the weights. A tenant *above its share* is limited:

- Requests of other tenants are ordered before its own, whatever their deadlines.
- The next request is taken from the tenant with the least usage divided by weight.
- If a request of another tenant does not fit yet, no request of a tenant above its share is admitted until it does.
- It leaves free what the other tenants recently used, at most up to their shares.

A tenant that was recently the only active one may use the whole engine.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from gateway.requests.request import Request
from gateway.requests.waiting_arrays import Floats

Indices = NDArray[np.intp]


MEMORY_S = 10.0
"""Seconds in which the memory of past use fades by a factor of e: about as long as an answer takes. Convention."""

MAX_TENANTS = 1000
"""Most recent tenants that are remembered. Bounds memory."""


@dataclass(slots=True)
class _Recent:
    """What a tenant did lately: when it last got a request in (s), its prefill (s, fading), its peak usage (fading)."""

    at: float
    weight: float
    prefill_s: float = 0.0
    peak: float = 0.0
    peak_at: float = -math.inf


@dataclass(slots=True)
class RecentTenants:
    """The tenants that got requests admitted lately. All times are monotonic seconds."""

    _recent: dict[str, _Recent] = field(default_factory=dict)

    def note(self, now: float, admitted: Iterable[Request], token_s: float) -> None:
        """Count ``admitted`` requests, whose prompts take ``token_s`` per token."""
        for request in admitted:
            recent = self._recent.pop(request.tenant, None) or _Recent(now, request.weight)
            faded = recent.prefill_s * math.exp((recent.at - now) / MEMORY_S)
            recent.at, recent.weight, recent.prefill_s = now, request.weight, faded + token_s * request.uncached_tokens
            self._recent[request.tenant] = recent
            if len(self._recent) > MAX_TENANTS:
                del self._recent[next(iter(self._recent))]

    def several(self, now: float) -> bool:
        """Return whether more than one tenant was active lately; forgets the others."""
        while len(self._recent) > 1:
            oldest = next(iter(self._recent))
            if self._recent[oldest].at >= now - MEMORY_S:
                return True
            del self._recent[oldest]
        return False

    def prefill_share(self, tenant: str, now: float) -> float:
        """Return the share of recent time that went into the tenant's prompts."""
        recent = self._recent.get(tenant)
        return recent.prefill_s * math.exp((recent.at - now) / MEMORY_S) / MEMORY_S if recent is not None else 0.0

    def room(self, now: float, usage: dict[str, float], level: float) -> float:
        """Return the seconds of a step that tenants below their share recently used and do not use now."""
        room = 0.0
        for tenant, recent in self._recent.items():
            used = usage.get(tenant, 0.0)
            peak = recent.peak * math.exp((recent.peak_at - now) / MEMORY_S) if recent.peak else 0.0
            if used >= peak:
                recent.peak, recent.peak_at = used, now
            elif used <= level * recent.weight:
                room += max(0.0, min(peak, level * recent.weight) - used)
        return room


@dataclass(slots=True)
class TenantShares:
    """The tenants of the waiting requests, in the order of these.

    Attributes:
        of: number of the tenant of each waiting request.
        usage: seconds of a step by tenant, divided by its weight.
        weight: by tenant.
        level: total usage divided by total weight, of the tenants with waiting or running requests: the fair share per
            unit of weight.
        room_s: seconds of a step that tenants above their share leave free.
    """

    of: Indices
    usage: list[float]
    weight: list[float]
    level: float
    room_s: float

    @classmethod
    def between(
        cls,
        now: float,
        waiting: Sequence[Request],
        running: Collection[Request],
        recent: RecentTenants,
        token_s: float,
        context_s: float,
        step_s: float,
    ) -> TenantShares:
        """Return the shares of the tenants of ``waiting``.

        ``token_s``: seconds per token in a step. ``context_s``: per token of context. ``step_s``: of the longest step.
        """
        numbers: dict[str, int] = {}
        weight: list[float] = []
        of = []
        for request in waiting:
            number = numbers.get(request.tenant)
            if number is None:
                number = numbers[request.tenant] = len(numbers)
                weight.append(request.weight)
            of.append(number)
        queued = len(numbers)
        decodes = [0.0] * queued
        for request in running:
            number = numbers.get(request.tenant)
            if number is None:
                number = numbers[request.tenant] = len(numbers)
                weight.append(request.weight)
                decodes.append(0.0)
            decodes[number] += request.sequences * (token_s + context_s * request.length)
        usage = [
            used + recent.prefill_share(tenant, now) * step_s for tenant, used in zip(numbers, decodes, strict=True)
        ]
        level = sum(usage) / sum(weight) if weight else 0.0
        room_s = recent.room(now, dict(zip(numbers, decodes, strict=True)), level)
        by_weight = [used / own for used, own in zip(usage, weight, strict=True)]
        return cls(np.array(of, dtype=np.intp), by_weight[:queued], weight[:queued], level, room_s)

    def above(self, which: Indices | None = None) -> NDArray[np.bool_]:
        """Return for each request ``which`` (None: all) whether its tenant is above its share."""
        of = self.of if which is None else self.of[which]
        return np.asarray((np.array(self.usage) > self.level)[of], dtype=np.bool_)

    def merge(self, order: Indices, cost: Floats) -> Indices:
        """Return the requests ``order`` with the tenants in turn: next is always the one with the least usage.

        ``cost``: what each request will add to its tenant's usage (s of a step). Each tenant keeps its own order.
        """
        finish = np.empty(len(order))
        of = self.of[order]
        for number, used in enumerate(self.usage):
            own = np.flatnonzero(of == number)
            finish[own] = used + np.cumsum(cost[order[own]]) / self.weight[number]
        return order[np.argsort(finish, kind="stable")]
