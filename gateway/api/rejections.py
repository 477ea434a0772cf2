"""How the gateway says no: 429 with what would have been possible."""

from __future__ import annotations

from gateway.api.errors import ApiError, retry_headers
from gateway.api.slo_headers import HEADER
from gateway.policies.base import Rejection


def unattainable(rejection: Rejection) -> ApiError:
    """429: the bound cannot be met; says what would be (design section 7)."""
    bound, request = rejection.bound, rejection.request
    name = {"ttft": "Time to first token", "tpot": "Time per output token", "e2e": "End-to-end latency"}[bound]
    asked = {"ttft": request.slo.ttft_s, "tpot": request.slo.tpot_s, "e2e": request.slo.e2e_s}[bound] or 0.0
    again = (
        "Not even an idle engine would meet it; ask for a looser bound."
        if rejection.infeasible
        else "Ask for a looser bound, or try again later."
    )
    return ApiError(
        429,
        f"{name} of {asked * 1000:g} ms cannot be promised: {rejection.predicted_s * 1000:.0f} ms is predicted, "
        f"{rejection.attainable_s * 1000:.0f} ms could be promised. {again}",
        "slo_unattainable",
        f"{bound}_unattainable",
        HEADER[bound],
        extra={
            "predicted_ms": round(rejection.predicted_s * 1000, 1),
            "attainable_ms": round(rejection.attainable_s * 1000, 1),
        },
        headers=retry_headers(rejection.retry_after_s, should_retry=not rejection.infeasible),
    )


def queue_full(message: str, limit: int, retry_after_s: float) -> ApiError:
    """429: no place to wait; ``limit`` is how many there are."""
    return ApiError(
        429,
        f"{message} Its limit is {limit}; try again later.",
        "slo_unattainable",
        "queue_full",
        headers=retry_headers(retry_after_s),
    )
