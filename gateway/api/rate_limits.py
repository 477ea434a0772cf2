"""Limits of tenants at the HTTP edge: the 429 that names the limit, and OpenAI's ``x-ratelimit-*`` headers."""

from __future__ import annotations

import time

from gateway.api.errors import ApiError, Headers, retry_headers
from gateway.tenants.limits import Bucket, Exceeded, TenantLimiter

_KINDS = {
    "requests_per_minute": ("requests", "requests per minute (RPM)"),
    "tokens_per_minute": ("tokens", "tokens per minute (TPM)"),
    "max_concurrent": ("concurrent_requests", "concurrent requests"),
}
"""Type of the error, and what the message calls the limit. The first two are OpenAI's."""

_LONGEST_RETRY_S = 3600.0
"""``Retry-After`` (s) of a request that no wait can help. ``x-should-retry: false`` goes with it. Convention."""


def rate_limited(tenant: str, exceeded: Exceeded) -> ApiError:
    """429: the request exceeds a limit of its tenant. The error has OpenAI's code, and ``limit`` names the setting."""
    kind, name = _KINDS[exceeded.limit]
    wait_s = exceeded.retry_after_s
    if wait_s is None:
        advice = "The request is larger than the limit; send a smaller one."
    elif exceeded.limit == "max_concurrent":
        advice = "Wait until one of them ends."
    else:
        advice = f"Please try again in {duration(wait_s)}."
    return ApiError(
        429,
        f"Rate limit reached for tenant {tenant} on {name}: Limit {exceeded.allowed}, Used {exceeded.used}, "
        f"Requested {exceeded.needed}. {advice}",
        kind,
        "rate_limit_exceeded",
        extra={"limit": exceeded.limit},
        headers=retry_headers(_LONGEST_RETRY_S if wait_s is None else wait_s, should_retry=wait_s is not None),
    )


def rate_limit_headers(limiter: TenantLimiter) -> Headers:
    """Return the headers for a response to a tenant: the limit, what is left, and when all of it will be."""
    headers: Headers = []
    now = time.monotonic()
    for name, bucket in ((b"requests", limiter.requests), (b"tokens", limiter.tokens)):
        if bucket is not None:
            headers += _headers_of(name, bucket, now)
    return headers


def _headers_of(name: bytes, bucket: Bucket, now: float) -> Headers:
    bucket.refill(now)
    return [
        (b"x-ratelimit-limit-" + name, b"%d" % bucket.capacity),
        (b"x-ratelimit-remaining-" + name, b"%d" % max(0, int(bucket.level))),
        (b"x-ratelimit-reset-" + name, duration(bucket.wait_s(bucket.capacity)).encode()),
    ]


def duration(seconds: float) -> str:
    """Return a duration as OpenAI writes it: ``12ms``, ``8.64s``, ``1m26.4s``, ``1h0m0s``. Rounded up to 1 ms."""
    ms = -int(-seconds * 1000 // 1)
    if ms < 1000:
        return f"{ms}ms"
    minutes, ms = divmod(ms, 60_000)
    text = f"{ms / 1000:g}s"
    if not minutes:
        return text
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h{minutes}m{text}" if hours else f"{minutes}m{text}"
