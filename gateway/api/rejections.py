"""The answers to requests that no engine will serve: 429 with the bound that could be met, or 503."""

from __future__ import annotations

from gateway.api.errors import ApiError, draining, retry_headers, unavailable
from gateway.api.slo_headers import HEADER
from gateway.policies.base import Rejection
from gateway.scheduling.queue_outcome import Draining, EngineDown, QueueFull

_BOUND_NAMES = {"ttft": "Time to first token", "tpot": "Time per output token", "e2e": "End-to-end latency"}


def answer_to(outcome: Rejection | QueueFull | EngineDown | Draining) -> tuple[str, ApiError]:
    """Return the ledger's reason and the response for an engine queue's negative ``outcome``."""
    match outcome:
        case Rejection(bound=bound):
            return f"{bound}_unattainable", unattainable(outcome)
        case QueueFull(slo_class=slo_class, limit=limit, retry_after_s=retry_after_s):
            message = f"The queue of this SLO class is full (classes.{slo_class}.max_waiting)."
            return "queue_full", queue_full(message, limit, retry_after_s)
        case EngineDown(retry_after_s=retry_after_s):
            back = f"expected back in {retry_after_s:.0f} s at the earliest"
            message = f"The engine is down and {back}, too late for this request."
            return "engine_down", unavailable(message, "engine_unavailable", retry_after_s)
        case Draining():
            return "draining", draining()


def unattainable(rejection: Rejection) -> ApiError:
    """429: the policy rejected the request. The message and the error object state the bound that could be met."""
    request, slo = rejection.request, rejection.request.slo
    bound_s = {"ttft": slo.ttft_s, "tpot": slo.tpot_s, "e2e": slo.e2e_s}[rejection.bound] or 0.0
    origin = ""
    if rejection.bound in slo.from_class:
        origin = f" (the default of SLO class {request.slo_class!r}; {HEADER[rejection.bound]} overrides it)"
    advice = (
        "An idle engine cannot meet it either; set a looser bound."
        if rejection.infeasible
        else "Set a looser bound, or try again later."
    )
    return ApiError(
        429,
        f"{_BOUND_NAMES[rejection.bound]} of {bound_s * 1000:g} ms{origin} cannot be met: "
        f"{rejection.predicted_s * 1000:.0f} ms is predicted, {rejection.attainable_s * 1000:.0f} ms is attainable. "
        f"{advice}",
        "slo_unattainable",
        f"{rejection.bound}_unattainable",
        HEADER[rejection.bound],
        extra={
            "predicted_ms": round(rejection.predicted_s * 1000, 1),
            "attainable_ms": round(rejection.attainable_s * 1000, 1),
        },
        headers=retry_headers(rejection.retry_after_s, should_retry=not rejection.infeasible),
    )


def queue_full(message: str, limit: int, retry_after_s: float) -> ApiError:
    """429: as many requests as allowed (``limit``) are waiting or open. The ``message`` names the setting."""
    return ApiError(
        429,
        f"{message} The limit is {limit}; try again later.",
        "slo_unattainable",
        "queue_full",
        headers=retry_headers(retry_after_s),
    )
