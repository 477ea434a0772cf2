"""Limits of a tenant: requests and tokens per minute, and open requests. All keys of the tenant share them.

A rate is a token bucket: it holds the limit of one minute and refills evenly, so a tenant may use a minute's amount at
once. Tokens are reserved when a request is accepted for scheduling and settled when it ends, so the level may become
negative: later requests then wait until the debt is refilled.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

from gateway.scheduling.shards import Shard

Limit = Literal["requests_per_minute", "tokens_per_minute", "max_concurrent"]
LIMITS: tuple[Limit, ...] = ("requests_per_minute", "tokens_per_minute", "max_concurrent")

RETRY_CONCURRENT_S = 1.0
"""Seconds after which to retry a request beyond ``max_concurrent``: when another one ends is not known. Convention."""


@dataclass(frozen=True, slots=True)
class TenantLimits:
    """The limits of one tenant. None: no limit.

    ``largest_prompt``: the longest prompt (tokens) that may wait for a full bucket and leave a debt; None:
    ``tokens_per_minute``.
    """

    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None
    max_concurrent: int | None = None
    largest_prompt: int | None = None

    def part_of(self, shard: Shard) -> TenantLimits:
        """Return the part of one of several gateways, at least 1 of each limit. Prompts may be as long as before."""
        if shard.count == 1:
            return self
        parts = {name: None if (limit := getattr(self, name)) is None else shard.part(limit) for name in LIMITS}
        return TenantLimits(**parts, largest_prompt=self.tokens_per_minute)


@dataclass(frozen=True, slots=True)
class Exceeded:
    """A request beyond ``limit``. ``retry_after_s``: when it would be within; None if it never will be.

    ``used`` of ``allowed`` is in use, and the request needs ``needed`` more.
    """

    limit: Limit
    allowed: int
    used: int
    needed: int
    retry_after_s: float | None


@dataclass(slots=True)
class Bucket:
    """A rate limit of ``capacity`` per minute. ``level``: what is left at ``at`` (monotonic s)."""

    capacity: int
    level: float
    at: float

    def refill(self, now: float) -> None:
        """Add what the time since the last call allows."""
        self.level = min(float(self.capacity), self.level + (now - self.at) * self.capacity / 60)
        self.at = now

    def wait_s(self, amount: float) -> float:
        """Return the seconds until the level is ``amount``; 0 if it is."""
        return max(0.0, (amount - self.level) * 60 / self.capacity)


class TenantLimiter:
    """Applies the limits of one tenant. Costs the same however many tenants there are."""

    __slots__ = ("limits", "open", "requests", "tokens")

    def __init__(self, limits: TenantLimits, now: float) -> None:
        self.limits = limits
        self.open = 0
        """Requests that have entered and not left."""
        self.requests = _bucket(None, limits.requests_per_minute, now)
        self.tokens = _bucket(None, limits.tokens_per_minute, now)

    def set_limits(self, limits: TenantLimits, now: float) -> None:
        """Replace the limits. What was used of the old ones stays used."""
        if limits != self.limits:
            self.limits = limits
            self.requests = _bucket(self.requests, limits.requests_per_minute, now)
            self.tokens = _bucket(self.tokens, limits.tokens_per_minute, now)

    def enter(self, now: float, generates: bool) -> Exceeded | None:
        """Count a new request, or return which limit it exceeds. Call `leave` for each that entered.

        ``generates``: it will `reserve` tokens, so there must be some.
        """
        allowed = self.limits.max_concurrent
        if allowed is not None and self.open >= allowed:
            return Exceeded("max_concurrent", allowed, self.open, 1, RETRY_CONCURRENT_S)
        requests, tokens = self.requests, self.tokens
        if requests is not None:
            requests.refill(now)
            if requests.level < 1:
                return _exceeded("requests_per_minute", requests, 1)
        if generates and tokens is not None:
            tokens.refill(now)
            if tokens.level < 1:
                return _exceeded("tokens_per_minute", tokens, 1)
        if requests is not None:
            requests.level -= 1
        self.open += 1
        return None

    def leave(self) -> None:
        """Note that a request that entered has ended."""
        self.open -= 1

    def reserve(self, prompt: int, expected: float, now: float) -> float | Exceeded:
        """Take ``prompt`` and ``expected`` output tokens, and return how many were taken, for `settle`.

        An expectation beyond the whole bucket is cut to it, so that the request can run alone. So can a prompt up to
        ``largest_prompt``, which leaves a debt. A longer one never can: `Exceeded.retry_after_s` is None.
        """
        tokens = self.tokens
        if tokens is None:
            return 0.0
        tokens.refill(now)
        largest = self.limits.largest_prompt or tokens.capacity
        if prompt > largest:
            return Exceeded("tokens_per_minute", largest, _used(tokens), prompt, None)
        needed = float(min(prompt + expected, tokens.capacity))
        if tokens.level < needed:
            return _exceeded("tokens_per_minute", tokens, needed)
        amount = max(needed, float(prompt))
        tokens.level -= amount
        return amount

    def settle(self, reserved: float, used: float) -> None:
        """Replace what a request ``reserved`` by the tokens that it ``used``."""
        if self.tokens is not None:
            self.tokens.level = min(float(self.tokens.capacity), self.tokens.level + reserved - used)


class Tenants:
    """The tenants that have limits. Bounded by the configured keys."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._limiters: dict[str, TenantLimiter] = {}

    def set_limits(self, limits: Mapping[str, TenantLimits]) -> None:
        """Replace the limits by tenant. Open requests of a tenant that has none now still count until they end."""
        now = self._clock()
        for tenant, of_tenant in limits.items():
            limiter = self._limiters.get(tenant)
            if limiter is not None:
                limiter.set_limits(of_tenant, now)
            elif of_tenant != TenantLimits():
                self._limiters[tenant] = TenantLimiter(of_tenant, now)
        for tenant, limiter in list(self._limiters.items()):
            if limits.get(tenant, TenantLimits()) == TenantLimits():
                limiter.set_limits(TenantLimits(), now)
                if not limiter.open:
                    # Its debts are forgiven: a key that is made anew for the tenant begins with full buckets.
                    del self._limiters[tenant]

    def of(self, tenant: str) -> TenantLimiter | None:
        """Return the limiter of ``tenant``; None if it has no limits."""
        return self._limiters.get(tenant)


def _bucket(old: Bucket | None, capacity: int | None, now: float) -> Bucket | None:
    if capacity is None:
        return None
    if old is None:
        return Bucket(capacity, float(capacity), now)
    old.refill(now)
    return Bucket(capacity, min(float(capacity), old.level + capacity - old.capacity), now)


def _exceeded(limit: Limit, bucket: Bucket, needed: float) -> Exceeded:
    return Exceeded(limit, bucket.capacity, _used(bucket), round(needed), bucket.wait_s(needed))


def _used(bucket: Bucket) -> int:
    return round(bucket.capacity - bucket.level)
