"""Token buckets of tenants: what they allow, what is settled, and what a reload of the limits keeps."""

from __future__ import annotations

import random

import pytest

from gateway.scheduling.shards import Shard
from gateway.tenants.limits import Bucket, Exceeded, TenantLimiter, TenantLimits, Tenants
from gateway.tenants.usage import MAX_TENANTS, OTHER, Usage


def limiter(**limits: int) -> TenantLimiter:
    return TenantLimiter(TenantLimits(**limits), 0.0)


def test_requests_per_minute_allows_a_minutes_burst_and_then_the_rate() -> None:
    tenant = limiter(requests_per_minute=60)
    assert [tenant.enter(0.0, False) for _ in range(60)] == [None] * 60
    exceeded = tenant.enter(0.0, False)
    assert isinstance(exceeded, Exceeded)
    assert (exceeded.limit, exceeded.allowed, exceeded.used, exceeded.retry_after_s) == (
        "requests_per_minute",
        60,
        60,
        1.0,
    )
    assert tenant.enter(1.0, False) is None
    assert tenant.enter(1.0, False) is not None


@pytest.mark.parametrize("per_minute", [1, 7, 60, 10_000_000])
def test_rate_over_many_minutes_is_the_limit(per_minute: int) -> None:
    tenant, now, rng = limiter(requests_per_minute=per_minute), 0.0, random.Random(1)
    bucket = tenant.requests
    assert bucket is not None
    taken = 0
    while now < 600:
        now += rng.expovariate(0.5)
        bucket.refill(now)
        taken += int(bucket.level)
        bucket.level -= int(bucket.level)
    assert per_minute * 9 <= taken <= per_minute * 11 + per_minute * now / 600


def test_prompt_beyond_the_part_of_a_gateway_leaves_a_debt() -> None:
    tenant = TenantLimiter(TenantLimits(tokens_per_minute=1000).part_of(Shard(0, 4)), 0.0)
    assert tenant.reserve(600, 100, 0.0) == 600
    assert isinstance(tenant.reserve(1, 1, 0.0), Exceeded)
    # 350 tokens of debt, at 250 tokens per minute.
    assert isinstance(tenant.reserve(10, 0, 84.0), Exceeded)
    assert tenant.reserve(1, 0, 85.0) == 1
    never = tenant.reserve(1001, 1, 10_000.0)
    assert isinstance(never, Exceeded)
    assert (never.allowed, never.retry_after_s) == (1000, None)


def test_parts_of_the_gateways_add_up_to_the_limits_of_a_tenant() -> None:
    limits = TenantLimits(requests_per_minute=10, tokens_per_minute=1001, max_concurrent=3)
    parts = [limits.part_of(Shard(index, 3)) for index in range(3)]
    assert [part.requests_per_minute for part in parts] == [4, 3, 3]
    assert [part.tokens_per_minute for part in parts] == [334, 334, 333]
    assert [part.max_concurrent for part in parts] == [1, 1, 1]
    assert limits.part_of(Shard()) is limits
    assert TenantLimits().part_of(Shard(0, 3)) == TenantLimits()


def test_max_concurrent_counts_open_requests() -> None:
    tenant = limiter(max_concurrent=2)
    assert [tenant.enter(0.0, False) is None for _ in range(3)] == [True, True, False]
    tenant.leave()
    assert tenant.enter(0.0, False) is None


def test_rejected_request_uses_nothing() -> None:
    tenant = limiter(requests_per_minute=10, max_concurrent=1, tokens_per_minute=5)
    tenant.enter(0.0, True)
    for _ in range(100):
        tenant.enter(0.0, True)
    assert tenant.requests is not None
    assert (tenant.requests.level, tenant.open) == (9, 1)


def test_tokens_are_reserved_and_settled_with_what_was_used() -> None:
    tenant = limiter(tokens_per_minute=1000)
    reserved = tenant.reserve(100, 200.5, 0.0)
    assert reserved == 300.5
    assert tenant.tokens is not None
    assert tenant.tokens.level == 699.5
    tenant.settle(reserved, 150)
    assert tenant.tokens.level == 850


def test_request_longer_than_expected_leaves_a_debt_that_later_ones_wait_for() -> None:
    tenant = limiter(tokens_per_minute=600)
    reserved = tenant.reserve(100, 100, 0.0)
    assert isinstance(reserved, float)
    tenant.settle(reserved, 1200)
    exceeded = tenant.enter(0.0, True)
    assert isinstance(exceeded, Exceeded)
    assert exceeded.retry_after_s == pytest.approx(60.1)
    assert tenant.enter(0.0, False) is None, "a route that generates nothing uses no tokens"
    assert tenant.enter(60.2, True) is None


def test_expectation_beyond_the_bucket_is_cut_but_a_prompt_never_fits() -> None:
    tenant = limiter(tokens_per_minute=100)
    assert tenant.reserve(50, 500, 0.0) == 100
    never = tenant.reserve(101, 1, 600.0)
    assert isinstance(never, Exceeded)
    assert never.retry_after_s is None


def test_settling_a_request_never_fills_beyond_the_limit() -> None:
    tenant = limiter(tokens_per_minute=100)
    reserved = tenant.reserve(50, 0, 0.0)
    assert isinstance(reserved, float)
    assert tenant.tokens is not None
    tenant.tokens.refill(60.0)
    tenant.settle(reserved, 0)
    assert tenant.tokens.level == 100


def test_clock_that_stands_still_or_jumps_far_keeps_the_level_in_bounds() -> None:
    bucket = Bucket(60, 0.0, 5.0)
    bucket.refill(5.0)
    assert bucket.level == 0
    bucket.refill(1e9)
    assert bucket.level == 60


def test_changed_limits_keep_what_was_used_and_who_is_open() -> None:
    now = [0.0]
    tenants = Tenants(lambda: now[0])
    tenants.set_limits({"a": TenantLimits(requests_per_minute=10, max_concurrent=5)})
    tenant = tenants.of("a")
    assert tenant is not None
    for _ in range(4):
        tenant.enter(0.0, False)
    tenants.set_limits({"a": TenantLimits(requests_per_minute=20, max_concurrent=4)})
    assert tenants.of("a") is tenant
    assert tenant.requests is not None
    assert tenant.requests.level == 16
    assert isinstance(tenant.enter(0.0, False), Exceeded)
    tenants.set_limits({"a": TenantLimits(requests_per_minute=2)})
    assert tenant.requests.level < 1


def test_tenants_without_limits_are_not_kept() -> None:
    tenants = Tenants(lambda: 0.0)
    tenants.set_limits({"a": TenantLimits(max_concurrent=1), "b": TenantLimits()})
    assert tenants.of("b") is None
    tenant = tenants.of("a")
    assert tenant is not None
    tenant.enter(0.0, False)
    tenants.set_limits({})
    assert tenants.of("a") is tenant, "its open request must be able to leave"
    tenant.leave()
    tenants.set_limits({"a": TenantLimits()})
    assert tenants.of("a") is None


def test_usage_tells_a_bounded_number_of_tenants_apart() -> None:
    usage = Usage()
    for number in range(MAX_TENANTS + 50):
        usage.of(f"tenant-{number}").requests["finished"] += 1
    assert len(usage.tenants) == MAX_TENANTS + 1
    assert usage.tenants[OTHER].requests["finished"] == 50
    assert (usage.label("tenant-3"), usage.label("tenant-549")) == ("tenant-3", OTHER)
    document = usage.document(20)
    assert len(document) == 21
    assert sum(of["requests"]["finished"] for of in document.values()) == MAX_TENANTS + 50
