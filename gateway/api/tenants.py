"""Applies the limits of tenants to HTTP requests, and counts what the tenants use."""

from __future__ import annotations

import time
from functools import partial
from typing import Any

from gateway.api.auth import ApiKey
from gateway.api.call import Call
from gateway.api.errors import ApiError
from gateway.api.http_request import HttpRequest
from gateway.api.models import asks_for_models
from gateway.api.rate_limits import rate_limit_headers, rate_limited
from gateway.api.request_records import asks_for_records
from gateway.observability.ledger import Entry
from gateway.tenants.limits import Exceeded, TenantLimiter, Tenants
from gateway.tenants.usage import Usage

RATE_LIMITED = "rate_limited"
"""Reason in the ledger of a request that a limit of its tenant rejected."""


class TenantAccounts:
    """Follows each request of a known tenant: `enter`, `reserve` and `settle` if it is scheduled, and `leave`.

    A request of a tenant without limits costs one look-up.
    """

    def __init__(self, usage: Usage) -> None:
        self.tenants = Tenants()
        self.usage = usage

    def enter(self, http: HttpRequest, key: ApiKey) -> None:
        """Count a request of ``key`` that begins. Raises `ApiError` 429 if it exceeds a limit of the tenant.

        Reading the models or the records of requests does not count: no engine is asked.
        """
        limiter = self.tenants.of(key.tenant)
        if limiter is None:
            return
        http.rate_headers = partial(rate_limit_headers, limiter)
        if http.route.generation is None and (asks_for_models(http) or asks_for_records(http)):
            return
        exceeded = limiter.enter(time.monotonic(), http.route.generation is not None)
        if exceeded is not None:
            http.limited = True
            raise self._rejected(key.tenant, exceeded)
        http.limiter = limiter

    def reserve(self, call: Call) -> ApiError | None:
        """Reserve the tokens of the prompt and the predicted output; return the 429 if the tenant has too few left.

        Of several prompts, each counts like the longest.
        """
        limiter, request = call.http.limiter, call.request
        if limiter is None:
            return None
        call.reserved_prompt_tokens = request.prompt_tokens * call.prompt.prompts
        expected = request.predicted_tokens * request.sequences
        reserved = limiter.reserve(call.reserved_prompt_tokens, expected, time.monotonic())
        if isinstance(reserved, Exceeded):
            return self._rejected(request.tenant, reserved)
        call.reserved_tokens = reserved
        return None

    def settle(self, call: Call, entry: Entry) -> None:
        """Replace the reserved tokens by the used ones. A request that an engine refused or failed used none."""
        limiter, request = call.http.limiter, call.request
        if limiter is None or not call.reserved_tokens:
            return
        served = request.admitted_s is not None and (entry.outcome in ("finished", "cancelled") or request.generated)
        prompt = request.prompt_tokens
        if call.prompt.prompts > 1:
            # Engines count only the longest one, or all together.
            prompt = max(prompt, call.reserved_prompt_tokens)
        limiter.settle(call.reserved_tokens, prompt + request.generated if served else 0)
        call.reserved_tokens = 0.0

    def leave(self, http: HttpRequest) -> None:
        """Count a request that has ended. A scheduled one is counted by `on_close`."""
        if http.limiter is not None:
            http.limiter.leave()
        if http.tenant and http.entry is None:
            is_served = http.route.generation is None and http.status < 400
            outcome = "unscheduled" if is_served else RATE_LIMITED if http.limited else "refused"
            self.usage.of(http.tenant).requests[outcome] += 1

    def on_close(self, entry: Entry) -> None:
        """Count a scheduled request that ended (`Ledger.on_close`)."""
        usage, request = self.usage.of(entry.request.tenant), entry.request
        usage.requests[RATE_LIMITED if entry.reason == RATE_LIMITED else entry.outcome or ""] += 1
        if request.admitted_s is not None:
            usage.prompt_tokens += request.prompt_tokens
            usage.output_tokens += request.generated

    def document(self, limit: int) -> dict[str, Any]:
        """Return usage by tenant for `/status`, with what is left of its limits. At most ``limit`` tenants by name."""
        document = self.usage.document(limit)
        now = time.monotonic()
        for tenant, usage in document.items():
            limiter = self.tenants.of(tenant)
            if limiter is not None:
                usage["limits"] = _limits(limiter, now)
        return document

    def _rejected(self, tenant: str, exceeded: Exceeded) -> ApiError:
        self.usage.of(tenant).limited[exceeded.limit] += 1
        return rate_limited(tenant, exceeded)


def _limits(limiter: TenantLimiter, now: float) -> dict[str, Any]:
    """Return each limit and what is left of it."""
    left: dict[str, int] = {}
    for name, bucket in (("requests_per_minute", limiter.requests), ("tokens_per_minute", limiter.tokens)):
        if bucket is not None:
            bucket.refill(now)
            left[name] = int(bucket.level)
    if limiter.limits.max_concurrent is not None:
        left["max_concurrent"] = limiter.limits.max_concurrent - limiter.open
    return {name: {"limit": getattr(limiter.limits, name), "remaining": max(0, count)} for name, count in left.items()}
